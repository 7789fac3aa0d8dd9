"""The training group: steps ahead of their results, never past the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.actors import Session, TrainerGroup, WorkerError
from raytron.actors.trainer import MESSAGE_S, MOST, per_message, resources
from raytron.config import ScalingConfig
from raytron.parallel import Mesh
from tests.actors.engines import Toy


@pytest.fixture(scope="module")
def trainer(cluster: Session) -> Iterator[TrainerGroup]:
    with TrainerGroup(Mesh(dp=2), ScalingConfig(num_workers=2)) as group:
        yield group


@pytest.fixture
def fresh(trainer: TrainerGroup) -> TrainerGroup:
    trainer.create(Toy)
    return trainer


def test_steps_come_in_order_and_end_where_told(fresh: TrainerGroup):
    assert [m["step"] for m in fresh.steps(150)] == list(range(1, 151))
    assert fresh.step() == {"step": 151, "sum": 302}
    assert list(fresh.steps(0)) == []


def test_a_wish_to_stop_loses_no_metrics(fresh: TrainerGroup):
    seen: list[int] = []
    seen.extend(m["step"] for m in fresh.steps(10_000, stop=lambda: len(seen) >= 5))
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) < 10_000
    assert fresh.save() == f"step {len(seen)}"


def test_evaluate_save_and_load_answer_once(fresh: TrainerGroup):
    fresh.load(12)
    assert fresh.evaluate(batches=3) == {"batches": 3, "after": 12}
    assert fresh.save() == "step 12"


def test_a_failing_step_is_an_error_of_the_iterator(fresh: TrainerGroup):
    fresh.load("not a number")
    with pytest.raises(WorkerError, match=r"failed in train_step: TypeError") as caught:
        list(fresh.steps(5))
    assert "engines.py" in caught.value.failure.trace
    fresh.regroup()


def test_ranks_and_mesh_must_agree():
    with pytest.raises(ValueError, match=r"num_workers is 3 but the mesh has .* 4 ranks"):
        TrainerGroup(Mesh(dp=2, tp=2), ScalingConfig(num_workers=3))


@given(st.floats(1e-6, 100))
def test_messages_are_short_and_long_steps_travel_alone(step_s: float):
    size = per_message(step_s)
    assert 1 <= size <= MOST
    assert size == 1 or size * step_s <= MESSAGE_S


def test_resources_of_a_rank():
    assert resources(ScalingConfig()) == {"CPU": 1.0}
    assert resources(ScalingConfig(use_gpu=True)) == {"CPU": 1.0, "GPU": 1.0}
    assert resources(ScalingConfig(use_gpu=True, resources_per_worker={"GPU": 0.5}, accelerator_type="H100")) == {
        "GPU": 0.5,
        "accelerator_type:H100": 0.001,
    }
