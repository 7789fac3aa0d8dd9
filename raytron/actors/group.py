"""A group of actors that hosts one engine per rank: placement, rendezvous, fan-out, failure, size.

    place -> start actors -> share devices -> connect (generation n) -> create -> call, call, call ...
                                                  ^                                     | a rank fails
                                                  +------ regroup (generation n+1) <----+ the others give up

The store ranks meet at lives in this process, so no rank's death takes it away; each generation meets under its own
prefix. Calls are messages to all ranks, executed in the order they are sent, and several may be under way. The first
failure tells every other rank to give up, so that nobody stays in a collective with a peer that will not come; the
group then refuses calls until it is regrouped. Ray's own restarts and retries are off (see worker.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from raytron.actors.devices import Devices, share
from raytron.actors.failures import DIED, Failure, WorkerError, cause
from raytron.actors.placement import Placement, place
from raytron.actors.worker import Where, Worker
from raytron.parallel.mesh import Mesh

__all__ = ["ActorGroup", "Calls"]

log = logging.getLogger(__name__)

SETTLE_S = 5.0  # how long to look for the cause when only its echoes have been heard
DEATH = "\nThe actor is dead because"  # where Ray's report gets to the point
ANSWER_S = 10.0  # a living worker's control thread answers within this


class Calls:
    """One fan-out under way: `refs` are Ray's, one per rank of `ranks`."""

    def __init__(self, group: ActorGroup, method: str, ranks: Sequence[int], refs: list[ray.ObjectRef]) -> None:
        self._group, self.method, self.ranks, self.refs = group, method, tuple(ranks), refs
        self._generation = group.generation

    def results(self, timeout_s: float | None = None) -> list[Any]:
        """What each rank returned, in the order of `ranks`.

        Raises:
            WorkerError: a rank failed or died; every rank was told to give up.
            TimeoutError: not all answered in time; every rank was told to give up.
        """
        try:
            results = ray.get(self.refs, timeout=timeout_s)
            self._group._underway.discard(self)
            return results
        except GetTimeoutError:
            ready, _ = ray.wait(self.refs, num_returns=len(self.refs), timeout=0)
            late = [rank for rank, ref in zip(self.ranks, self.refs, strict=True) if ref not in ready]
            reason = f"ranks {late} did not answer {self.method} within {timeout_s:g} s"
            self._abandon(reason)
            raise TimeoutError(reason) from None
        except (RayActorError, RayTaskError) as error:
            self._abandon(f"a rank failed in {self.method}")
            raise self._blame(error) from None

    def _abandon(self, reason: str) -> None:
        if self._generation == self._group.generation:  # an old generation's news must not break the new one
            self._group.abandon(reason)

    def _blame(self, error: Exception) -> WorkerError | Exception:
        """Collect reports until one is a cause and not an echo, or `SETTLE_S` passed."""
        failures: list[Failure] = []
        waiting = dict(zip(self.refs, self.ranks, strict=True))
        deadline = time.monotonic() + SETTLE_S
        while waiting and all(f.echo for f in failures) and (left := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            ready += [r for r in ray.wait(list(waiting), num_returns=len(waiting), timeout=0)[0] if r not in ready]
            for ref in ready:
                if failure := self._failure(ref, waiting.pop(ref)):
                    failures.append(failure)
        if not failures:  # none of ours: the arguments or the result could not be sent
            return error
        first = cause(failures)
        return WorkerError(first, tuple(f for f in failures if f is not first))

    def _failure(self, ref: ray.ObjectRef, rank: int) -> Failure | None:
        try:
            ray.get(ref)
        except RayActorError as error:
            where = self._group.where[rank]
            text = str(error)
            return Failure(rank, where.host, where.pid, self.method, DIED, text[text.find(DEATH) + 1 :].strip())
        except RayTaskError as error:
            if isinstance(error.cause, WorkerError):
                return error.cause.failure
            # Ray's own trouble with a rank's answer, such as a result that cannot be pickled.
            where, kind = self._group.where[rank], type(error.cause).__name__
            return Failure(rank, where.host, where.pid, self.method, kind, str(error.cause), str(error))
        return None


class ActorGroup:
    """Actors on seats of a mesh, connected and ready to `create` an engine.

    Args:
        mesh: who is whose neighbour.
        each: resources of one rank, by Ray's names; by default one CPU slot.
        strategy: Ray's placement strategy within a unit (see placement.py).
        wait_s: how long to wait for the cluster to grant the seats.
        start_s: how long actors may take to start and connect.
        timeout_s: seconds after which a collective that nobody abandoned fails by itself.
        threads: CPU threads per rank; by default a fair share of its node's cores.
        env: environment variables of the workers.

    Attributes:
        where: where each rank runs.
        generation: how often the ranks have met.

    Use it as a context manager, or call `shutdown`; either leaves no process behind.

    Raises:
        CapacityError: the cluster cannot hold the mesh.
        WorkerError: a rank failed to start.
    """

    def __init__(
        self,
        mesh: Mesh,
        each: Mapping[str, float] | None = None,
        *,
        strategy: str = "PACK",
        wait_s: float = 30.0,
        start_s: float = 300.0,
        timeout_s: float = 600.0,
        threads: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.mesh = mesh
        self.generation = -1
        self.where: list[Where | None] = [None] * mesh.size
        self._start_s, self._timeout_s, self._threads, self._env = start_s, timeout_s, threads, dict(env or {})
        self._workers: list[Any] = [None] * mesh.size
        self._devices: tuple[Devices, ...] = ()
        self._underway: set[Calls] = set()
        self._broken: str | None = None
        self._closed = False
        self._placement: Placement = place(mesh, each or {"CPU": 1}, strategy=strategy, wait_s=wait_s)
        try:
            self._store = dist.TCPStore("0.0.0.0", 0, None, True, wait_for_workers=False) if mesh.size > 1 else None
            self._start(range(mesh.size))
            self._connect()
        except BaseException:
            self.shutdown()
            raise

    @property
    def workers(self) -> tuple[Any, ...]:
        """The `Worker` actors, by rank: for what goes past the group, such as `transport.ObjectStore`."""
        return tuple(self._workers)

    def create(
        self, factory: Callable[..., Any], *args: Any, ranks: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        """Build an engine on every rank (or on `ranks`): `factory(world, *args, **kwargs)`, which must be picklable."""
        self._check()
        self._fan_out("create", ranks, lambda _: (factory, *args), kwargs, "create").results()

    def submit(
        self,
        method: str,
        *args: Any,
        per_rank: Sequence[Any] | None = None,
        ranks: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Calls:
        """Call `method` of the engine on every rank (or on `ranks`) without waiting.

        Args:
            args, kwargs: the same for every rank; an `ObjectRef` arrives as its value.
            per_rank: one more leading argument, for each of the ranks called its own.
        """
        self._check()
        each = self._leading(per_rank, ranks)
        return self._fan_out("call", ranks, lambda at: (method, *each(at), *args), kwargs, method)

    def call(
        self,
        method: str,
        *args: Any,
        per_rank: Sequence[Any] | None = None,
        ranks: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """`submit` and wait: what each rank returned, in rank order."""
        return self.submit(method, *args, per_rank=per_rank, ranks=ranks, **kwargs).results()

    def abandon(self, reason: str) -> None:
        """Tell every rank to give up its collectives, and refuse calls until `regroup`. Does not wait."""
        if self._broken is None:
            self._broken = reason
            for worker in self._workers:
                worker.give_up.remote(self.generation, reason)

    def regroup(self) -> tuple[int, ...]:
        """Meet again under the next generation, with a fresh process on the seat of every rank that died.

        Survivors keep their process and their engine; an engine's `rejoin(world)`, where it has one, is told the new
        world. The fresh ranks, whose numbers are returned, host nothing until `create(..., ranks=...)`.
        """
        self.abandon("the group is being regrouped")
        lost = self._lost()
        for rank in lost:
            ray.kill(self._workers[rank])  # one that hangs must not come back
        self._start(lost)
        self._connect()
        self._forget_calls()
        return lost

    def shutdown(self, close_s: float | None = None) -> None:
        """Close the engines, end the processes and give the seats back. Doing it again does nothing.

        Args:
            close_s: how long engines may take to close (a checkpoint may still be on its way out); by default ten
                minutes, half a minute when a rank has failed.
        """
        if self._closed:
            return
        self._closed = True
        close_s = close_s or (600.0 if self._broken is None else 30.0)
        if ray.is_initialized():
            workers = [w for w in self._workers if w is not None]
            self._close_engines(workers, close_s)
            for worker in workers:
                ray.kill(worker)
            self._placement.remove()
            self._await_exit(workers)
            self._forget_calls()
        self._workers, self._store = [], None

    def __enter__(self) -> ActorGroup:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not self._closed:
            self.abandon(f"the controller left with {type(error).__name__}")
        self.shutdown()

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("this group was shut down; make a new one")
        if self._broken is not None:
            raise RuntimeError(f"this group is broken ({self._broken}); regroup it or shut it down")

    def _leading(self, per_rank: Sequence[Any] | None, ranks: Sequence[int] | None) -> Callable[[int], tuple]:
        if per_rank is None:
            return lambda _: ()
        wanted = self.mesh.size if ranks is None else len(ranks)
        if len(per_rank) != wanted:
            raise ValueError(f"per_rank has {len(per_rank)} items for {wanted} ranks; give one for each rank called")
        return lambda at: (per_rank[at],)

    def _fan_out(
        self,
        method: str,
        ranks: Sequence[int] | None,
        args_of: Callable[[int], tuple],
        kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Calls:
        ranks = range(self.mesh.size) if ranks is None else ranks
        refs = [getattr(self._workers[r], method).remote(*args_of(at), **(kwargs or {})) for at, r in enumerate(ranks)]
        calls = Calls(self, name or method, ranks, refs)
        self._underway.add(calls)
        return calls

    def _start(self, ranks: Sequence[int]) -> None:
        """Start a worker on the seat of each of `ranks`, all at once, and set all of them up."""
        for rank in ranks:
            # Task events feed Ray's dashboard, and cost a tenth of a call.
            self._workers[rank] = Worker.options(**self._placement.options(rank), enable_task_events=False).remote(rank)
            self.where[rank] = Where(self._placement.seats[rank].node, self._placement.seats[rank].node[:8], 0, ())
        for rank, where in zip(ranks, self._fan_out("where", ranks, lambda _: ()).results(self._start_s), strict=True):
            self.where[rank] = where
        nodes = [w.node for w in self.where]
        kept = {rank: devices for rank, devices in enumerate(self._devices) if rank not in ranks}
        self._devices = share([(w.node, w.gpus) for w in self.where], kept)
        self._fan_out(
            "prepare",
            ranks,
            lambda at: (self._env, self._devices[ranks[at]].visible, self._threads, nodes.count(nodes[ranks[at]])),
        ).results(self._start_s)

    def _connect(self) -> None:
        self.generation, self._broken = self.generation + 1, None
        address = (ray.util.get_node_ip_address(), self._store.port) if self._store else None
        self._fan_out(
            "connect",
            None,
            lambda rank: (self.mesh, rank, address, self.generation, self._timeout_s, self._devices[rank].name),
        ).results(self._start_s)

    def _lost(self) -> tuple[int, ...]:
        """Ranks whose process is gone or does not answer."""
        refs = [worker.where.remote() for worker in self._workers]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=ANSWER_S)
        return tuple(rank for rank, ref in enumerate(refs) if ref not in ready or _died(ref))

    def _forget_calls(self) -> None:
        """Look at what nobody asked for any more, or Ray would print each failure among it as unhandled."""
        refs = [ref for calls in self._underway for ref in calls.refs]
        self._underway.clear()
        for ref in ray.wait(refs, num_returns=len(refs), timeout=ANSWER_S)[0] if refs else ():
            _died(ref)

    def _close_engines(self, workers: Sequence[Any], close_s: float) -> None:
        refs = [worker.close.remote() for worker in workers]
        ready, late = ray.wait(refs, num_returns=len(refs), timeout=close_s) if refs else ([], [])
        for ref in ready:
            try:
                ray.get(ref)
            except RayTaskError as error:
                log.warning("while closing: %s", error.cause)
            except RayActorError:
                log.debug("a rank was gone before it could close")
        if late:
            log.warning("%d of %d ranks did not close within %g s", len(late), len(refs), close_s)

    def _await_exit(self, workers: Sequence[Any]) -> None:
        """Until Ray has declared every worker dead, and those on this machine have left the process table."""
        if not workers:
            return
        ray.wait([worker.where.remote() for worker in workers], num_returns=len(workers), timeout=ANSWER_S)
        me = ray.get_runtime_context().get_node_id()
        here = [Path(f"/proc/{w.pid}") for w in self.where if w is not None and w.pid and w.node == me]
        deadline = time.monotonic() + ANSWER_S
        while any(p.exists() for p in here) and time.monotonic() < deadline:
            time.sleep(0.01)


def _died(ref: ray.ObjectRef) -> bool:
    try:
        ray.get(ref)
    except RayActorError:
        return True
    except RayTaskError:
        return False
    return False
