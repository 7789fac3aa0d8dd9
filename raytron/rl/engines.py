"""The rollout engines of an RL run: what they are, the seats they take and leave, and the record of what they do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytron.actors.placement import Berth, Node, cluster, ranks_that_fit, without
from raytron.actors.replica import bundles
from raytron.actors.rollout import RolloutGroup
from raytron.actors.rollout_seats import engines_that_fit
from raytron.actors.runs import RunFolder
from raytron.actors.trainer import resources
from raytron.config import FailureConfig, LoRAConfig
from raytron.metrics import Timeline
from raytron.rl.config import RLConfig, RolloutConfig
from raytron.rl.environments import Task
from raytron.rl.trainers import Trainers

__all__ = ["engine_bundles", "fitting_dp", "fitting_engines", "rollout_group", "trainers_turn", "watched"]


def rollout_group(
    config: RLConfig,
    arch: Any,
    task: Task,
    folder: RunFolder,
    wait_s: float,
    beside: Sequence[Berth] = (),
    others: Sequence[Mapping[str, float]] = (),
    requested: int | None = None,
) -> RolloutGroup:
    """The engines, not yet started: of a range as many as find seats. Weights come by the first push, all else from a
    directory without any.

    Args:
        arch: the policy's.
        wait_s: how long to wait for the cluster to grant seats.
        beside: the seats of the trainer, which colocated engines share.
        others: bundles of what will take seats besides them.
        requested: how many engines the user has asked for, of a range.
    """
    rollout, path = config.rollout, folder.path / "engine"
    path.mkdir(parents=True, exist_ok=True)
    folder.write_json("engine/config.json", arch.to_hf())
    task.save_tokenizer(path)
    engine = replace(
        rollout.engine,
        path=str(path),
        weights="await",
        dtype="bf16" if config.precision == "bf16" else "fp32",
        lora=arch.lora if rollout.engine.engine == "native" else LoRAConfig(),
        reproducible=config.reproducible or rollout.engine.reproducible,
        logprobs="processed",
        sleep_mode=rollout.colocate and rollout.engine.engine == "vllm",
    )
    failures = FailureConfig(max_failures=rollout.max_restarts)
    more = {"failures": failures, "timeout_s": rollout.engine_timeout_s, "wait_s": wait_s, "bounds": rollout.bounds}
    count = fitting_engines(rollout, without(cluster(), others), requested)
    return RolloutGroup([engine] * count, _each(rollout), beside=beside if rollout.colocate else (), **more)


def _each(rollout: RolloutConfig) -> dict[str, float]:
    """What one rank of an engine reserves."""
    return {"CPU": rollout.cpus, "GPU": rollout.gpus}


def engine_bundles(rollout: RolloutConfig, count: int) -> list[dict[str, float]]:
    """What `count` engines reserve, each bundle on one node."""
    if rollout.colocate:
        return []
    return bundles(rollout.engine, _each(rollout)) * count


def fitting_engines(rollout: RolloutConfig, nodes: Sequence[Node], requested: int | None = None) -> int:
    """How many engines to start: of a range as many as find seats, or were `requested`, and the fewest in any case."""
    low, high = rollout.bounds
    high = high if requested is None else max(low, min(requested, high))
    if low == high:
        return high
    return max(low, engines_that_fit(nodes, bundles(rollout.engine, _each(rollout)), high))


def fitting_dp(config: RLConfig, groups: int, others: Sequence[Mapping[str, float]], nodes: Sequence[Node]) -> int:
    """The largest dp that `scaling.num_workers` allows and that finds seats beside the engines.

    Args:
        groups: trainer groups of that size: the policy's, and a critic's.
        others: bundles of what takes seats besides them.

    Where not even the fewest ranks fit it is that of the most: placing them says what was asked and what is there.
    """
    low, high = config.scaling.bounds
    unit = config.parallel.tp * config.parallel.pp
    free = ranks_that_fit(without(nodes, others), resources(config.scaling), config.parallel.tp) // groups
    workers = min(high, free) // unit * unit
    return (workers if workers >= low else high) // unit


@asynccontextmanager
async def trainers_turn(rollout: RolloutConfig, trainers: Trainers, engines: RolloutGroup) -> AsyncIterator[None]:
    """The trainer computes inside. Colocated engines sleep from here until they are woken, after the next push."""
    if not rollout.colocate:
        yield
        return
    await engines.sleep(weights=rollout.release == "weights")
    await trainers.wake()
    yield
    await trainers.sleep()


@contextmanager
def watched(engines: RolloutGroup, judges: Sequence[str], path: Path, keep: bool) -> Iterator[Timeline]:
    """A timeline with a lane for each engine, which records what they do; those that join later have theirs at the end.

    judges: lanes of what judges. keep: go on behind an earlier start's.
    """
    lanes = [f"engine {engine}" for engine in range(len(engines.configs))]
    with Timeline(path, keep=keep, lanes=[*lanes, *judges, "trainer", "push", "evaluation", "saves"]) as timeline:
        engines.on_state = lambda engine, what: timeline.state(f"engine {engine}", None if what == "idle" else what)
        try:
            yield timeline
        finally:
            engines.on_state = None
