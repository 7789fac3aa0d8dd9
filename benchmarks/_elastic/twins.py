"""What twins cost: the same step with and without them, in turns, on the same four ranks.

    python -m _elastic.twins DRILL ROUNDS

Prints one JSON object: seconds a step of each, in the order taken, and the buffers whose twins differ in the end.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from _elastic.drill import LENGTH, RANKS, Drill
from _elastic.ours import config
from raytron.actors import ActorGroup, Session
from raytron.config import PretrainConfig
from raytron.data.loader import MicroBatch
from raytron.models import build
from raytron.models.registry import resolve
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from raytron.training import TrainEngine
from raytron.training.twins import twins_that_differ

STEPS = 3  # a turn


class Both:
    """One rank of two runs."""

    def __init__(self, world: World, told: PretrainConfig) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(world.rank)
        arch, self.world = resolve(told.model), world
        self.engines = {twins: self._engine(arch, told, twins) for twins in (True, False)}
        count = told.micro_batches(world.mesh.dp, world.coords.dp, uneven=True)
        tokens_NBT = torch.randint(0, arch.vocab_size, (count, told.micro_batch_size, LENGTH + 1))
        self.batches = [
            MicroBatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), torch.ones(len(t), LENGTH)) for t in tokens_NBT
        ]

    def _engine(self, arch: Any, told: PretrainConfig, twins: bool) -> TrainEngine:
        told = replace(told, parallel=replace(told.parallel, twins=twins))
        return TrainEngine(build(arch, self.world, parallel=told.parallel, seed=0), told)

    def steps(self, twins: bool) -> float:
        """Seconds a step."""
        self.world.axis("world").barrier()
        start = time.perf_counter()
        for _ in range(STEPS):
            self.engines[twins].step(self.batches)
        return (time.perf_counter() - start) / STEPS

    def differ(self) -> list[str]:
        """See `twins_that_differ`."""
        return twins_that_differ(self.engines[True])


def main(drill: Drill, rounds: int) -> None:
    taken: dict[str, list[float]] = {"with": [], "without": []}
    with Session(slots=RANKS), ActorGroup(Mesh(dp=RANKS), threads=1) as group:
        group.create(Both, config("", drill))
        for round_ in range(rounds + 1):
            for name in list(taken)[:: -1 if round_ % 2 else 1]:
                took = group.call("steps", name == "with")[0]
                taken[name] += [took] if round_ else []  # the first ones warm up
        print(json.dumps({**taken, "differ": group.call("differ")[0]}))


if __name__ == "__main__":
    main(Drill.read(sys.argv[1]), int(sys.argv[2]))
