"""Our side of elastic.py: `raytron.pretrain`, on a cluster of its own, while a drill is done to it.

    python -m _elastic.ours FOLDER DRILL

FOLDER gets what drill.py says, the run's journal, and changes.jsonl: a line from each rank for each move it took part
in, with what the plan of it came to and what this rank put on the wire.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from _elastic.drill import BATCH, LENGTH, RANKS, Deeds, Drill, Ledger, nodes
from raytron.actors.journal import read_journal
from raytron.config import (
    CheckpointConfig,
    DataConfig,
    ElasticConfig,
    EvalConfig,
    FailureConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    ScalingConfig,
    ScheduleConfig,
)
from raytron.metrics import StepRecord
from raytron.parallel.collectives import Axis, World
from raytron.pretrain import Run
from raytron.training.reshape import Change, Moved
from raytron.training.seating import Seating
from raytron.training.task import PretrainTask

NAME = "run"


def config(folder: str, drill: Drill) -> PretrainConfig:
    """The run's."""
    return PretrainConfig(
        model=ModelConfig(preset="llama-3m", overrides={**drill.sizes, "tie_word_embeddings": False}),
        data=DataConfig(mock=True, tokenizer="null:4095", sequence_length=LENGTH),
        optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-4),
        schedule=ScheduleConfig(kind="constant"),
        parallel=ParallelConfig(twins=drill.twins),
        precision="fp32",
        global_batch_size=BATCH,
        steps=100_000,
        evaluation=EvalConfig(batches=0),
        logging=LoggingConfig(tensorboard=False),
        run=RunConfig(NAME, folder, FailureConfig(-1), CheckpointConfig(interval=drill.interval)),
        scaling=ScalingConfig(num_workers=(drill.fewest, RANKS), spares=drill.spares),
        elastic=ElasticConfig(hold_s=0.0),
    )


class Task(PretrainTask):
    """A rank that says what it does and when."""

    def __init__(self, world: World | None, config: PretrainConfig, *args: Any, **options: Any) -> None:
        torch.set_num_threads(1)  # nodes here share their cores, which none of them knows
        self._ledger = Ledger(config.run.storage_path)
        super().__init__(world, config, *args, **options)

    def train_step(self) -> StepRecord | None:
        start = time.time()
        record = super().train_step()
        if record is not None:
            self._ledger.step(record.step, start, self.world.mesh.size)
        return record

    def reshape(self, world: World | None, transit: World, me: str, change: Change) -> Moved:
        with _counting_sent(transit.axis("world")) as sent:
            moved = super().reshape(world, transit, me, change)
        what = {"old": _told(change.old), "new": _told(change.new), "lost": sorted(change.lost), "whole": change.whole}
        self._ledger.note("changes", time=time.time(), place=me, **what, **asdict(moved), sent=sum(sent))
        return moved

    def _adopted(self, told: Any) -> None:
        super()._adopted(told)
        if self.world is not None:
            self._ledger.seat(self.world.rank, self.world.mesh.size)


@contextmanager
def _counting_sent(axis: Axis) -> Iterator[list[int]]:
    """Bytes of each message sent over the axis within the block."""
    sent: list[int] = []

    def isend(tensor: torch.Tensor, dst: int) -> Any:
        sent.append(tensor.nbytes)
        return Axis.isend(axis, tensor, dst)

    axis.isend = isend
    try:
        yield sent
    finally:
        del axis.isend


def _told(seating: Seating) -> dict[str, Any]:
    mesh = seating.mesh
    return {"mesh": [mesh.dp, mesh.pp, mesh.cp, mesh.tp], "places": list(seating.places)}


class Timed(Run):
    """A run of such ranks."""

    task = Task


def ready(folder: str, spares: int) -> bool:
    """Whether so many spares stand by: of all newcomers, each recovery has given one a seat."""
    events = read_journal(Path(folder, NAME, "journal.jsonl"))
    came = sum(len(event["places"]) for event in events if event["event"] == "newcomers")
    return not spares or came - sum(event["event"] == "recovered" for event in events) >= spares


def main(folder: str, drill: Drill) -> None:
    stop = partial(os.kill, os.getpid(), signal.SIGTERM)
    with nodes(drill.nodes) as cluster, Deeds(cluster, folder, drill, partial(ready, folder, drill.spares), stop):
        Timed.of(config(folder, drill)).drive()


if __name__ == "__main__":
    main(sys.argv[1], Drill.read(sys.argv[2]))
