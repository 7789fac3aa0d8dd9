"""Between raytron's run types and Ray Train's.

`raytron.config` declares its own fields, under Ray Train's names, so that `--help` needs no Ray. Drivers take either:
`from_ray_train` turns Ray Train's objects into raytron's. A field that raytron would ignore is refused, not dropped.
Importing ray.train costs a second, so it waits until one of its objects is asked for.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from raytron.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

if TYPE_CHECKING:
    import ray.train

__all__ = ["from_ray_train", "result"]


def from_ray_train(config: Any) -> Any:
    """raytron's equal of one of Ray Train's configs; anything else is returned as it is.

    Raises:
        ValueError: a field is set that raytron does not honour.
    """
    module = sys.modules.get("ray.train")
    if module is None:  # nobody can have made one of its objects
        return config
    for name, convert in _CONVERTERS.items():
        if isinstance(config, getattr(module, name)):
            return convert(config)
    return config


def result(
    metrics: Mapping[str, Any] | None,
    checkpoint: str | None,
    path: str,
    error: Exception | None = None,
) -> ray.train.Result:
    """A finished run as Ray Train reports one.

    Args:
        metrics: the last step's.
        checkpoint: folder or URI of the newest checkpoint, None where there is none.
        path: folder or URI of the run.
        error: why training stopped early.
    """
    import ray.train

    return ray.train.Result(
        metrics=None if metrics is None else dict(metrics),
        checkpoint=None if checkpoint is None else ray.train.Checkpoint(checkpoint),
        error=error,
        path=path,
    )


def _scaling(config: Any) -> ScalingConfig:
    _refuse(config, "num_workers", "use_gpu", "resources_per_worker", "placement_strategy", "accelerator_type")
    return ScalingConfig(
        num_workers=config.num_workers,
        use_gpu=config.use_gpu,
        resources_per_worker=config.resources_per_worker,
        placement_strategy=config.placement_strategy,
        accelerator_type=config.accelerator_type,
    )


def _failure(config: Any) -> FailureConfig:
    _refuse(config, "max_failures")
    return FailureConfig(max_failures=config.max_failures)


def _checkpoint(config: Any) -> CheckpointConfig:
    _refuse(config, "num_to_keep")
    return CheckpointConfig(num_to_keep=config.num_to_keep)


def _run(config: Any) -> RunConfig:
    _refuse(config, "name", "storage_path", "failure_config", "checkpoint_config")
    given = {"name": config.name}
    if config.storage_path != type(config)().storage_path:  # Ray fills in a folder of its own; raytron's is `runs`
        given["storage_path"] = config.storage_path
    return RunConfig(
        **given,
        failure_config=_failure(config.failure_config),
        checkpoint_config=_checkpoint(config.checkpoint_config),
    )


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "ScalingConfig": _scaling,
    "FailureConfig": _failure,
    "CheckpointConfig": _checkpoint,
    "RunConfig": _run,
}


def _refuse(config: Any, *honoured: str) -> None:
    """Fail on a field that differs from its default and is not `honoured`."""
    default = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in honoured and value != getattr(default, field.name):
            raise ValueError(
                f"ray.train.{type(config).__name__}.{field.name} is set to {value!r}, which raytron does not honour; "
                f"leave it at its default (honoured are {', '.join(honoured)})"
            )
