"""Ray Train's configs in, Ray Train's Result out."""

from __future__ import annotations

import pytest

from raytron.actors import from_ray_train, result
from raytron.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

train = pytest.importorskip("ray.train")


def test_every_config_converts():
    assert from_ray_train(train.ScalingConfig(num_workers=(2, 4), use_gpu=True)) == ScalingConfig((2, 4), True)
    assert from_ray_train(train.ScalingConfig(num_workers=3, resources_per_worker={"CPU": 2})) == ScalingConfig(
        3, resources_per_worker={"CPU": 2}
    )
    assert from_ray_train(train.FailureConfig(max_failures=-1)) == FailureConfig(-1)
    assert from_ray_train(train.CheckpointConfig(num_to_keep=3)) == CheckpointConfig(num_to_keep=3)
    given = train.RunConfig(
        name="a",
        storage_path="/tmp/x",
        failure_config=train.FailureConfig(2),
        checkpoint_config=train.CheckpointConfig(1),
    )
    assert from_ray_train(given) == RunConfig("a", "/tmp/x", FailureConfig(2), CheckpointConfig(1))
    assert from_ray_train(train.RunConfig(name="b")) == RunConfig("b", checkpoint_config=CheckpointConfig(None))


def test_anything_else_passes_through():
    config = ScalingConfig(4)
    assert from_ray_train(config) is config
    assert from_ray_train(None) is None


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (train.ScalingConfig(label_selector={"zone": "a"}), "ScalingConfig.label_selector"),
        (train.FailureConfig(max_preemption_failures=3), "FailureConfig.max_preemption_failures"),
        (train.CheckpointConfig(checkpoint_score_attribute="loss"), "CheckpointConfig.checkpoint_score_attribute"),
        (train.RunConfig(worker_runtime_env={"pip": ["x"]}), "RunConfig.worker_runtime_env"),
    ],
)
def test_what_would_be_ignored_is_refused(config: object, field: str):
    with pytest.raises(ValueError, match=field):
        from_ray_train(config)


def test_result(tmp_path):
    made = result({"loss": 1.5}, str(tmp_path / "step_1"), str(tmp_path), RuntimeError("stopped"))
    assert isinstance(made, train.Result)
    assert made.metrics == {"loss": 1.5}
    assert made.checkpoint.path == str(tmp_path / "step_1")
    assert isinstance(made.error, RuntimeError)
    assert result(None, None, "p").checkpoint is None
