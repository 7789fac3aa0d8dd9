"""A pretraining task that changes mesh: its data go on where they were, its records are kept, its saves are whole."""

from __future__ import annotations

import pytest

from raytron.checkpoint import CheckpointManager
from raytron.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    ScalingConfig,
    ScheduleConfig,
)
from raytron.data import build_datasets, prepare
from raytron.models.registry import resolve
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from raytron.training.seating import seat
from raytron.training.task import PretrainTask, sample_counts
from tests.training.crews import Crew, all_of, apart

TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = 6


def chosen() -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(preset="llama-3m", overrides=TINY),
        data=DataConfig(mock=True, tokenizer="null:127", sequence_length=16),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3),
        schedule=ScheduleConfig(kind="constant"),
        parallel=ParallelConfig(twins=True, bucket_mb=0.01),
        precision="fp64",
        global_batch_size=8,
        steps=STEPS,
        evaluation=EvalConfig(batches=2),
        scaling=ScalingConfig(num_workers=(1, 4)),
        run=RunConfig(checkpoint_config=CheckpointConfig(num_to_keep=None)),
    )


class Tasks(Crew):
    """Pretraining tasks instead of bare engines."""

    def __init__(self, mesh: Mesh, folder: str) -> None:
        self.folder = folder
        self.prepared = prepare(chosen().data, f"{folder}/data")
        build_datasets(chosen().data, self.prepared, *sample_counts(chosen()))  # as a driver does, before ranks map it
        super().__init__(mesh, chosen(), resolve(chosen().model))

    def make(self, world: World | None) -> PretrainTask:
        checkpoints = f"{self.folder}/checkpoints"
        return PretrainTask(world, self.config, self.arch, self.prepared, checkpoints, fresh=world is None)


def train(task: PretrainTask):
    return task.train_step()


def to_the_end(tasks: Tasks) -> None:
    while tasks.ranks[0].engine.counters.step < STEPS:
        all_of(tasks.run(train))


def close(tasks: Tasks) -> None:
    for task in tasks.ranks:
        task.close()
    tasks.leave()


def quiet(folder: str) -> tuple[list[float], float]:
    """Losses of every step, and the held-out one, of one rank."""
    tasks = Tasks(Mesh(), f"{folder}/quiet")
    to_the_end(tasks)
    (held_out,) = all_of(tasks.run(lambda task: task.evaluate()))
    records = tasks.ranks[0].since(0)
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    close(tasks)
    return [record.loss for record in records], held_out.loss


SLOW = (pytest.param(point, marks=pytest.mark.slow) for point in ("reduce", "published"))


@pytest.mark.parametrize("point", ["gather", *SLOW])
@apart
def test_a_task_goes_on_with_the_samples_that_are_next(point, tmp_path):
    losses, held_out = quiet(str(tmp_path))
    tasks = Tasks(Mesh(dp=4), str(tmp_path))
    for _ in range(2):
        all_of(tasks.run(train))
    tasks.strike(train, 0, point)  # the one that reports
    lost = [tasks.seating.places[0]]
    arch, old = tasks.arch, tasks.seating
    tasks.move(seat(tasks.config, arch, old, frozenset(lost), Mesh(dp=3)), lost)
    done = tasks.ranks[0].engine.counters.step
    assert done == (2 if point == "reduce" else 3)
    all_of(tasks.run(train))
    spare = [tasks.name()]
    tasks.move(seat(tasks.config, arch, tasks.seating, frozenset(), Mesh(dp=2, tp=2), spare))
    to_the_end(tasks)
    old_hand = next(task for task in tasks.ranks if len(task.since(0)) == STEPS)
    newcomer = tasks.tasks[spare[0]]
    for records, first in ((old_hand.since(0), 0), (old_hand.since(4), 4), (newcomer.since(0), done + 1)):
        assert [record.step for record in records] == list(range(first + 1, STEPS + 1))
        assert [record.loss for record in records] == pytest.approx(losses[first:], rel=1e-9)
        assert [record.consumed_samples for record in records] == [8 * record.step for record in records]
    evaluated = all_of(tasks.run(lambda task: task.evaluate()))
    assert evaluated[0].loss == pytest.approx(held_out, rel=1e-9)
    assert len({task.peak_flops for task in tasks.ranks}) == 1  # as one of them measured it
    close(tasks)


@apart
def test_a_save_cut_short_is_told_and_the_next_one_is_whole(tmp_path):
    tasks = Tasks(Mesh(dp=2), str(tmp_path))
    for _ in range(2):
        all_of(tasks.run(train))
    all_of(tasks.run(lambda task: task.save()))  # in the background
    tasks.strike(train, 1, "update")
    lost, spare = [tasks.seating.places[1]], [tasks.name()]
    tasks.move(seat(tasks.config, tasks.arch, tasks.seating, frozenset(lost), Mesh(dp=2), spare), lost)
    all_of(tasks.run(train))
    all_of(tasks.run(lambda task: task.save(wait=True)))
    found = CheckpointManager(f"{tmp_path}/checkpoints").list()
    assert found[0] == "step_00000004"
    assert set(found) <= {"step_00000004", "step_00000002"}  # the first was whole by then, or is not there
    wanted = all_of(tasks.run(train))[0].loss
    # And the whole of it is read back, in the same processes, by others too.
    tasks.leave()
    tasks.worlds = tasks.meet(Mesh(dp=2))
    answers = tasks.run(lambda task: task.restart(tasks.worlds[tasks.ranks.index(task)]))
    assert all_of(answers) == [(4, []), (4, [])]
    assert all_of(tasks.run(train))[0].loss == wanted
    assert [record.step for record in tasks.ranks[1].since(0)] == [5]
    close(tasks)


@pytest.mark.slow
@apart
def test_with_nothing_saved_a_task_restarts_from_the_beginning(tmp_path):
    losses, _ = quiet(str(tmp_path))
    tasks = Tasks(Mesh(dp=2), str(tmp_path))
    all_of(tasks.run(train))
    tasks.strike(train, 1, "vote")
    tasks.leave()
    tasks.worlds = tasks.meet(Mesh(dp=2))
    assert all_of(tasks.run(lambda task: task.restart(tasks.worlds[tasks.ranks.index(task)]))) == [(0, []), (0, [])]
    assert all_of(tasks.run(train))[0].loss == pytest.approx(losses[0], rel=1e-9)
    close(tasks)
