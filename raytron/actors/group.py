"""A group of actors that hosts one engine per rank: placement, rendezvous, fan-out, failure, size.

    place -> start actors -> share devices -> connect (generation n) -> create -> call, call, call ...
                                                  ^                                     | a rank fails
                                                  +------ regroup (generation n+1) <----+ the others give up

The store ranks meet at lives in this process, so no rank's death takes it away; each generation meets under its own
prefix. Calls are messages to all ranks, executed in the order they are sent, and several may be under way. The first
failure tells every other rank to give up, so that nobody stays in a collective with a peer that will not come; the
group then refuses calls until it is regrouped. Ray's own restarts and retries are off (see worker.py). A group that
also changes its size and shape is in reseating.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import remove_placement_group

from raytron.actors.calls import Calls
from raytron.actors.devices import share
from raytron.actors.failures import BrokenError
from raytron.actors.members import Chair, Member, ended, ready, survey
from raytron.actors.placement import Berth, Placement, place
from raytron.actors.worker import Where, Worker
from raytron.parallel.mesh import Mesh

__all__ = ["ActorGroup", "Calls"]

log = logging.getLogger(__name__)

ANSWER_S = 10.0  # a living worker answers and an ended one is gone within this
ADDRESS = tuple[str, int]


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
        members: the worker processes, by rank.
        generation: how often the ranks have met.
        broken: why calls are refused, None while they are not.
        each: resources of one rank.
        gone: nodes found to be gone, or to stand still, of which Ray may not know yet.

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
        self.broken: str | None = None
        self.members: list[Member] = []
        self.gone: set[str] = set()
        self.each, self._strategy = dict(each or {"CPU": 1}), strategy
        self._start_s, self._timeout_s, self._threads, self._env = start_s, timeout_s, threads, dict(env or {})
        self._crew: dict[str, Member] = {}  # everyone alive as far as is known, seated or not, by name
        self._ended: list[Member] = []
        self._numbers = count()
        self._underway: set[Calls] = set()
        self._ignored: set[ray.ObjectRef] = set()
        self._closed = False
        placement = place(mesh, self.each, strategy=strategy, wait_s=wait_s)
        self._groups = {group.id: group for group in placement.groups}  # that are to be given back
        try:
            self._store = self._open_store()
            self.members = self._hire(chairs_of(placement), range(mesh.size))
            self._connect()
        except BaseException:
            self.shutdown()
            raise

    @property
    def workers(self) -> tuple[Any, ...]:
        """The `Worker` actors, by rank: for what goes past the group, such as `transport.ObjectStore`."""
        return tuple(member.worker for member in self.members)

    @property
    def where(self) -> tuple[Where, ...]:
        """Where each rank runs."""
        return tuple(member.where for member in self.members)

    @property
    def berths(self) -> tuple[Berth, ...]:
        """The ranks' seats, for actors that take turns with them."""
        return tuple(
            Berth(member.chair.group, member.chair.seat.bundle, member.where.node, member.devices.used)
            for member in self.members
        )

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
        if self.broken is None:
            self.broken = reason
            for member in list(self._crew.values()):
                member.worker.give_up.remote(self.generation, reason)

    def regroup(self) -> tuple[int, ...]:
        """Meet again under the next generation, with a fresh process on the seat of every rank that died.

        Survivors keep their process and their engine; an engine's `rejoin(world)`, where it has one, is told the new
        world. The fresh ranks, whose numbers are returned, host nothing until `create(..., ranks=...)`.
        """
        self.abandon("the group is being regrouped")
        gone = survey(self.members, ANSWER_S)
        lost = tuple(rank for rank, member in enumerate(self.members) if member.name in gone)
        for rank in lost:
            self._end([self.members[rank]])
        for rank, member in zip(lost, self._hire([self.members[r].chair for r in lost], lost), strict=True):
            self.members[rank] = member
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
        close_s = close_s or (600.0 if self.broken is None else 30.0)
        if ray.is_initialized():
            crew = list(self._crew.values())
            self._close_engines(crew, close_s)
            self._end(crew)
            for group in self._groups.values():
                remove_placement_group(group)
            self._await_exit(self._ended)
            self._forget_calls()
        self.members, self._groups, self._store = [], {}, None

    def __enter__(self) -> ActorGroup:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not self._closed:
            self.abandon(f"the controller left with {type(error).__name__}")
        self.shutdown()

    def forget(self, calls: Calls) -> None:
        """Nobody has to look at these any more: they have ended well."""
        self._underway.discard(calls)

    def ignore(self, ref: ray.ObjectRef) -> None:
        """Look at the answer some time, or Ray would print its failure as unhandled."""
        self._ignored.add(ref)

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("this group was shut down; make a new one")
        if self.broken is not None:
            raise BrokenError(f"this group is broken ({self.broken}); regroup it or shut it down")

    def _open_store(self) -> dist.TCPStore | None:
        return dist.TCPStore("0.0.0.0", 0, None, True, wait_for_workers=False) if self.mesh.size > 1 else None

    def _address(self) -> ADDRESS | None:
        return (ray.util.get_node_ip_address(), self._store.port) if self._store else None

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
        members = self.members if ranks is None else [self.members[rank] for rank in ranks]
        return self._tell(members, method, args_of, kwargs, name)

    def _tell(
        self,
        members: Sequence[Member],
        method: str,
        args_of: Callable[[int], tuple] = lambda _: (),
        kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
        aside: bool = False,
    ) -> Calls:
        """Call the worker's `method` with `args_of` the position in `members`."""
        refs = [getattr(m.worker, method).remote(*args_of(at), **(kwargs or {})) for at, m in enumerate(members)]
        calls = Calls(self, name or method, members, refs, aside)
        if not aside:
            self._underway.add(calls)
        return calls

    def _hire(self, chairs: Sequence[Chair], ranks: Sequence[int | None]) -> list[Member]:
        """Start a worker on each of the chairs, all at once, and set all of them up. Nobody else is disturbed.

        Raises:
            WorkerError, TimeoutError: one did not start; none is left.
        """
        new = [self._summon(chair, rank) for chair, rank in zip(chairs, ranks, strict=True)]
        try:
            wheres = self._tell(new, "where", aside=True).results(self._start_s)
            for member, where in zip(new, wheres, strict=True):
                member.where = where
            everyone = list(self._crew.values())
            kept = {at: member.devices for at, member in enumerate(everyone) if member not in new}
            devices = share([(m.where.node, m.where.gpus) for m in everyone], kept)
            for at, member in enumerate(everyone):
                member.devices = devices[at]
            nodes = [member.where.node for member in everyone]
            self._tell(
                new,
                "prepare",
                lambda at: (self._env, new[at].devices.visible, self._threads, nodes.count(new[at].where.node)),
                aside=True,
            ).results(self._start_s)
        except BaseException:
            self._end(new)
            raise
        return new

    def _summon(self, chair: Chair, rank: int | None) -> Member:
        # Task events feed Ray's dashboard, and cost a tenth of a call.
        worker = Worker.options(**chair.options, enable_task_events=False).remote(rank)
        node = chair.seat.node
        member = Member(f"actor-{next(self._numbers)}", worker, chair, Where(node, node[:8], 0, ()), rank)
        self._crew[member.name] = member
        return member

    def _connect(self) -> None:
        self.generation, self.broken = self.generation + 1, None
        address = self._address()
        self._fan_out(
            "connect",
            None,
            lambda r: (self.mesh, r, address, self.generation, self._timeout_s, self.members[r].devices.name),
        ).results(self._start_s)

    def _end(self, members: Sequence[Member]) -> None:
        """End their processes, whatever they are doing. Does not wait."""
        for member in members:
            self._crew.pop(member.name, None)
            self._ended.append(member)
            ray.kill(member.worker)

    def _forget_calls(self, timeout_s: float = ANSWER_S) -> None:
        """Look at what nobody asked for any more, or Ray would print each failure among it as unhandled."""
        self._ignored |= {ref for calls in list(self._underway) for ref in calls.refs}
        self._underway.clear()
        for ref in ready(self._ignored, timeout_s):
            self._ignored.discard(ref)
            ended(ref)

    def _close_engines(self, members: Sequence[Member], close_s: float) -> None:
        refs = [member.worker.close.remote() for member in members]
        over = ready(refs, close_s)
        for ref in over:
            try:
                ray.get(ref)
            except RayTaskError as error:
                log.warning("while closing: %s", error.cause)
            except RayActorError:
                log.debug("a rank was gone before it could close")
        if len(over) < len(refs):
            log.warning("%d of %d ranks did not close within %g s", len(refs) - len(over), len(refs), close_s)

    def _await_exit(self, members: Sequence[Member]) -> None:
        """Until Ray has declared every worker dead, and those on this machine have left the process table."""
        if not members:
            return
        ready([member.worker.where.remote() for member in members], ANSWER_S)
        me = ray.get_runtime_context().get_node_id()
        here = [Path(f"/proc/{m.where.pid}") for m in members if m.where.pid and m.where.node == me]
        deadline = time.monotonic() + ANSWER_S
        while any(p.exists() for p in here) and time.monotonic() < deadline:
            time.sleep(0.01)


def chairs_of(placement: Placement) -> list[Chair]:
    """One for each of its seats, in rank order."""
    return [Chair(placement, seat) for seat in placement.seats]
