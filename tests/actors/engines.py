"""What the actors host in these tests: small engines that talk, fail and die on request."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping

import torch

from raytron.parallel import World
from raytron.parallel.layout import Layout
from raytron.parallel.storage import allocate


class Toy:
    """An engine of a few numbers."""

    def __init__(self, world: World, scale: int = 1) -> None:
        self.world, self.scale = world, scale
        self.steps = 0

    def rejoin(self, world: World) -> None:
        self.world = world

    def sum(self, value: int, axis: str = "world") -> int:
        """The sum of every rank's value along an axis."""
        total = torch.tensor([value * self.scale])
        return int(self.world.axis(axis).all_reduce_(total).item())

    def echo(self, *args: object, **kwargs: object) -> tuple:
        return self.world.rank, args, kwargs

    def environment(self, name: str) -> tuple[str | None, int]:
        return os.environ.get(name), torch.get_num_threads()

    def lock(self) -> object:
        """What cannot be sent."""
        return threading.Lock()

    def fail_on(self, rank: int) -> None:
        """One rank raises, the others wait for it."""
        if self.world.rank == rank:
            raise KeyError("no such shard")
        self.world.axis("world").barrier()

    def die_on(self, rank: int) -> None:
        """One rank's process is killed, the others wait for it."""
        if self.world.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        self.world.axis("world").barrier()

    def wait_for_all(self) -> None:
        self.world.axis("world").barrier()

    def train_step(self) -> dict | None:
        self.steps += 1
        total = self.sum(self.steps)
        return {"step": self.steps, "sum": total} if self.world.rank == 0 else None

    def evaluate(self, batches: int) -> dict | None:
        return {"batches": batches, "after": self.steps} if self.world.rank == 0 else None

    def save(self) -> str | None:
        return f"step {self.steps}" if self.world.rank == 0 else None

    def load(self, steps: int) -> None:
        self.steps = steps


class Holder:
    """Owns the buffers of one place of a layout; `values` are the canonical tensors to start from, None for zeros."""

    def __init__(self, world: World, layout: Layout, values: Mapping[str, torch.Tensor] | None) -> None:
        self._buffers = allocate(layout, [f"actor-{world.rank}"])
        if values is not None:
            fill(layout, self._buffers, values)

    def buffers(self) -> dict:
        return self._buffers

    def flat(self) -> dict:
        return {key: value.float().numpy() for key, value in self._buffers.items()}


def fill(layout: Layout, buffers: dict, values: Mapping[str, torch.Tensor]) -> None:
    """Write the canonical tensors `values` to wherever `layout` has them, of the buffers at hand."""
    for name, piece in layout:
        for place in piece.places:
            if (flat := buffers.get((place, piece.buffer))) is not None:
                here = torch.as_strided(flat, [hi - lo for lo, hi in piece.box], piece.strides, piece.offset)
                here.copy_(values[name][tuple(slice(lo, hi) for lo, hi in piece.box)])


class Keeper:
    """Holds a number. In a change of seats everyone hears the number of everyone who takes part, by place."""

    def __init__(self, world: World | None, number: int = 0) -> None:
        self.world, self.numbers = world, {"mine": number}
        self._next: tuple[World | None, dict[str, int]] | None = None

    def standing(self) -> dict[str, int]:
        return self.numbers

    def keep(self, number: int) -> None:
        self.numbers = {"mine": number}

    def reshape(self, world: World | None, transit: World, place: str, places: list[str]) -> int:
        axis = transit.axis("world")
        assert places[axis.index] == place
        heard = axis.all_gather(torch.tensor([sum(self.numbers.values())])).tolist()
        self._next = world, dict(zip(places, heard, strict=True))
        return transit.mesh.size

    def adopt(self) -> None:
        self.world, self.numbers = self._next

    def sum(self, axis: str) -> int:
        return int(self.world.axis(axis).all_reduce_(torch.tensor([self.world.rank])).item())

    def process(self) -> int:
        return os.getpid()

    def wait_for_all(self) -> None:
        self.world.axis("world").barrier()

    def sleep(self, seconds: float) -> None:
        threading.Event().wait(seconds)

    def train_step(self) -> int:
        return self.sum("world")
