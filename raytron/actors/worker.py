"""The actor that hosts one rank. It knows nothing of what it hosts.

An engine is whatever `factory(world, ...)` returns; the controller calls its methods by name. Two threads run here: one
for the engine, one ("control") that answers and gives up while the engine's thread sits in a collective.

Nothing is restarted or retried by Ray: a shard that came back empty would be worse than a lost one, so the controller
recreates ranks. The process never leaves by an ordinary exit, which would block on gloo groups with an operation in
flight for as long as their timeout: it is killed after `close`.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from raytron.actors.failures import Failure, WorkerError
from raytron.actors.transport import Cut, pack, unpack
from raytron.parallel.collectives import GaveUp, World
from raytron.parallel.mesh import Mesh

__all__ = ["Where", "Worker", "cores"]


@dataclass(frozen=True)
class Where:
    """Where a worker runs: Ray's node id, host name, process, and the GPU ids Ray granted it."""

    node: str
    host: str
    pid: int
    gpus: tuple[str, ...]


def cores() -> int:
    """Cores this process may use: its affinity, and its control group's quota where one is set."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and not (text := quota.read_text().split())[0].startswith("max"):
        mine = min(mine, math.ceil(int(text[0]) / int(text[1])))
    return max(1, mine)


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1})
class Worker:
    """Seat of one rank.

    Every method may raise `WorkerError`, which carries this rank, its host and the traceback as text.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._world: World | None = None
        self._engine: Any = None
        self._store: dist.Store | None = None
        self._generation = -1
        self._abandoned: tuple[int, str] = (-1, "")  # newest generation told to give up, and why

    @ray.method(concurrency_group="control")
    def where(self) -> Where:
        """Answers even while the engine's thread is blocked."""
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return Where(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid(), tuple(map(str, gpus)))

    def prepare(self, env: Mapping[str, str], visible: tuple[str, ...], threads: int | None, ranks_here: int) -> None:
        """Set the process up, before CUDA starts.

        Args:
            env: environment variables for the engine and its child processes.
            visible: GPU ids of all ranks of the group on this node.
            threads: CPU threads of this rank, by default its fair share of the cores.
            ranks_here: ranks of the group on this node.
        """
        threads = threads or max(1, cores() // ranks_here)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for children; libgomp has read it here already
        torch.set_num_threads(threads)
        if visible:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        os.environ.update(env)

    def connect(
        self, mesh: Mesh, rank: int, address: tuple[str, int] | None, generation: int, timeout_s: float, device: str
    ) -> None:
        """Take seat `rank` of `mesh` under the store prefix of `generation`, leaving the previous generation's groups.

        An engine that is to outlive its world has a method `rejoin(world)`, called here.
        """
        with self._reporting("connect"):
            if self._world is not None:
                self._world.give_up(f"generation {generation} takes over")
                self._world.close()
            self.rank, self._generation = rank, generation
            if self._store is None and address is not None:
                self._store = dist.TCPStore(*address, None, False, timedelta(seconds=timeout_s))
            self._world = World(mesh, rank, self._store, device=device, timeout=timeout_s, prefix=f"gen{generation}")
            if self._abandoned[0] >= generation:  # told to while the groups were being made
                self._world.give_up(self._abandoned[1])
            if hasattr(self._engine, "rejoin"):
                self._engine.rejoin(self._world)

    def create(self, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Host `factory(world, *args, **kwargs)`."""
        with self._engaged("create"):
            self._engine = factory(self._world, *args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The engine's `method(*args, **kwargs)`."""
        with self._engaged(method):
            return getattr(self._engine, method)(*args, **kwargs)

    def repeat(self, method: str, times: int) -> tuple[list[Any], float]:
        """The results of calling the engine's `method()` so many times, and the seconds it took, in one message."""
        with self._engaged(method):
            start = time.monotonic()
            return [getattr(self._engine, method)() for _ in range(times)], time.monotonic() - start

    def pack(self, buffers: str, cuts: Sequence[Cut]) -> np.ndarray:
        """Part of a message of `transport.ObjectStore`, from the buffers the engine's method of that name returns."""
        with self._reporting("pack"):
            return pack(cuts, getattr(self._engine, buffers)())

    def unpack(self, buffers: str, cuts: Sequence[Cut], data: np.ndarray) -> None:
        """Write a message into the engine's buffers."""
        with self._reporting("unpack"):
            unpack(data, cuts, getattr(self._engine, buffers)())

    @ray.method(concurrency_group="control")
    def give_up(self, generation: int, reason: str) -> None:
        """Abandon `generation`: its collectives raise `GaveUp`, and calls still queued for it fail unrun."""
        if generation >= self._abandoned[0]:
            self._abandoned = (generation, reason)
        if self._world is not None and self._generation == generation:
            self._world.give_up(reason)

    def close(self) -> None:
        """Close the engine (if it has a `close`) and leave the groups. The process is killed next."""
        with self._reporting("close"):
            if hasattr(self._engine, "close"):
                self._engine.close()
            if self._world is not None:
                self._world.close()

    @contextmanager
    def _engaged(self, method: str) -> Iterator[None]:
        """For what may use collectives: not after giving up, and whoever fails gives up at once, before the controller
        says so. The next call may be queued already, and its collectives would meet the peers' last ones: where sizes
        differ, gloo aborts the peers' processes."""
        with self._reporting(method):
            assert self._world is not None, "connect comes first"
            if self._abandoned[0] >= self._generation:
                raise GaveUp(f"generation {self._generation} was abandoned: {self._abandoned[1]}")
            try:
                yield
            except Exception as error:
                self.give_up(self._generation, f"{method} failed on rank {self.rank} with {type(error).__name__}")
                raise

    @contextmanager
    def _reporting(self, method: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failure = Failure.of(error, self.rank, socket.gethostname(), os.getpid(), method)
            raise WorkerError(failure) from None
