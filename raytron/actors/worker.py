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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
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

__all__ = ["Progress", "Where", "Worker", "cores"]

SLICE_S = 0.2  # how often a rendezvous is asked whether anybody still wants it


@dataclass(frozen=True)
class Where:
    """Where a worker runs: Ray's node id, host name, process, and the GPU ids Ray granted it."""

    node: str
    host: str
    pid: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """What a worker's engine is at.

    Attributes:
        method: under way, None between calls.
        still_s: how long nothing has happened: no step was done, nothing arrived from a peer, no method began.
        waiting_s: how long it has been waiting for a peer, None if it is not.
        steps: done so far. busy_s: seconds these took, waiting for peers not counted.
    """

    method: str | None
    still_s: float
    waiting_s: float | None
    steps: int
    busy_s: float


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

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank  # None for one that only stands by
        self._world: World | None = None
        self._transit: World | None = None  # of a change of seats, where others take part than those who sit afterwards
        self._engine: Any = None
        self._store: dist.Store | None = None
        self._generation = -1
        self._abandoned: tuple[int, str] = (-1, "")  # newest generation told to give up, and why
        self._method: str | None = None
        self._thread, self._began = 0, 0.0
        self._steps, self._busy_s = 0, 0.0

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
        self,
        mesh: Mesh | None,
        rank: int | None,
        address: tuple[str, int] | None,
        generation: int,
        timeout_s: float,
        device: str,
        transit: tuple[Mesh, int] | None = None,
    ) -> None:
        """Take seat `rank` of `mesh` under the store prefix of `generation`, leaving the previous generation's groups.

        Args:
            mesh, rank: None for one that has no seat from now on.
            transit: mesh of all who take part in a change of seats, and this one's position there; None where those
                are the ranks of `mesh`.

        An engine that is to outlive its world has a method `rejoin(world)`, called here.
        """
        with self._reporting("connect"):
            for world in self._worlds():
                world.give_up(f"generation {generation} takes over")
                world.close()
            self._world = self._transit = None
            self.rank, self._generation = rank, generation
            if address is not None:  # each time anew: a rendezvous that was left behind keeps its connection busy
                self._store = dist.TCPStore(*address, None, False, timedelta(seconds=timeout_s))
            if mesh is not None:
                self._world = self._meet(mesh, rank, device, timeout_s, f"gen{generation}")
            if transit is not None:
                self._transit = self._meet(*transit, device, timeout_s, f"gen{generation}-transit")
            if self._abandoned[0] >= generation:  # told to while the groups were being made
                for world in self._worlds():
                    world.give_up(self._abandoned[1])
            if hasattr(self._engine, "rejoin"):
                self._engine.rejoin(self._world)

    def _meet(self, mesh: Mesh, rank: int, device: str, timeout_s: float, prefix: str) -> World:
        """A world, made by a thread of its own: a rendezvous that a rank does not come to cannot be ended, but left."""
        made: Future[World] = Future()
        store = self._store

        def meet() -> None:
            try:
                made.set_result(World(mesh, rank, store, device=device, timeout=timeout_s, prefix=prefix))
            except Exception as error:
                made.set_exception(error)

        threading.Thread(target=meet, name=f"raytron-{prefix}", daemon=True).start()
        while not made.done():
            try:
                made.result(SLICE_S)
            except TimeoutError:
                if self._abandoned[0] >= self._generation:
                    raise GaveUp(f"rendezvous abandoned: {self._abandoned[1]}") from None
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # of this thread too
        return made.result()

    def stand_by(self, factory: Callable[[None], Any]) -> None:
        """Host `factory(None)`, an engine that has no seat yet; nobody waits for what it imports and reads."""
        with self._reporting("stand_by"):
            self._engine = factory(None)

    def create(self, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Host `factory(world, *args, **kwargs)`."""
        with self._engaged("create"):
            self._engine = factory(self._world, *args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The engine's `method(*args, **kwargs)`."""
        with self._engaged(method):
            return getattr(self._engine, method)(*args, **kwargs)

    def consult(self, method: str, *args: Any) -> Any:
        """The engine's `method(*args)`, which talks to no peer: also after giving up, behind all calls sent before."""
        with self._reporting(method):
            return getattr(self._engine, method)(*args)

    def reshape(self, place: str, change: Any) -> Any:
        """The engine's `reshape(world, transit, place, change)`: its seat in the world to come (None: it leaves), and
        the world of all who take part."""
        with self._engaged("reshape"):
            return self._engine.reshape(self._world, self._transit or self._world, place, change)

    def restart(self) -> Any:
        """The engine's `restart(world)`: it begins anew on its seat."""
        with self._engaged("restart"):
            return self._engine.restart(self._world)

    def repeat(self, method: str, times: int) -> tuple[list[Any], float]:
        """The results of calling the engine's `method()` so many times, and the seconds it took, in one message."""
        with self._engaged(method):
            start = time.monotonic()
            return [self._step(method) for _ in range(times)], time.monotonic() - start

    def _step(self, method: str) -> Any:
        assert self._world is not None, "steps need a seat"
        start, waited_s = time.monotonic(), self._world.waits(self._thread).total_s
        result = getattr(self._engine, method)()
        self._began = time.monotonic()
        self._busy_s += self._began - start - (self._world.waits(self._thread).total_s - waited_s)
        self._steps += 1
        return result

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        """Answers even while the engine's thread is blocked, as long as the process runs at all."""
        now, method, world = time.monotonic(), self._method, self._transit or self._world
        if method is None or world is None:
            return Progress(None, 0.0, None, self._steps, self._busy_s)
        waits = world.waits(self._thread)
        waiting_s = None if waits.since is None else now - waits.since
        return Progress(method, now - max(self._began, waits.last), waiting_s, self._steps, self._busy_s)

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
        if self._generation == generation:
            for world in self._worlds():
                world.give_up(reason)

    def close(self) -> None:
        """Close the engine (if it has a `close`) and leave the groups. The process is killed next."""
        with self._reporting("close"):
            if hasattr(self._engine, "close"):
                self._engine.close()
            for world in self._worlds():
                world.close()

    def _worlds(self) -> list[World]:
        return [world for world in (self._world, self._transit) if world is not None]

    @contextmanager
    def _engaged(self, method: str) -> Iterator[None]:
        """For what may use collectives: not after giving up, and whoever fails gives up at once, before the controller
        says so. The next call may be queued already, and its collectives would meet the peers' last ones: where sizes
        differ, gloo aborts the peers' processes."""
        with self._reporting(method):
            assert self._worlds(), "connect comes first"
            if self._abandoned[0] >= self._generation:
                raise GaveUp(f"generation {self._generation} was abandoned: {self._abandoned[1]}")
            self._method, self._thread, self._began = method, threading.get_ident(), time.monotonic()
            try:
                yield
            except Exception as error:
                self.give_up(self._generation, f"{method} failed on rank {self.rank} with {type(error).__name__}")
                raise
            finally:
                self._method = None

    @contextmanager
    def _reporting(self, method: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failure = Failure.of(error, self.rank, socket.gethostname(), os.getpid(), method)
            raise WorkerError(failure) from None
