"""A group that changes its size and shape while survivors keep their process and what it holds.

    members  --lose-->  vacant chairs  --recruit-->  newcomers (started and warm, connected to nothing)
       |                                                 |
       +-------------------- reseat ---------------------+    generation n+1: new ranks, new mesh
                                |
                    leaving members: sources of the move, then dismissed

Recruiting disturbs nobody and goes on in the background: processes start and import while the others still train, and
only `reseat` makes everybody meet anew. A lost rank's chair is taken again where its node lives; where the node is gone
Ray finds its bundle another place as long as others sit in the same placement group, and otherwise the group is given
back and a new one asked for. A placement group in which nobody sits is given back.

Where some leave, the new ranks are not all who have something to send: then everyone also meets in a world of its own,
the transit world, in the order of `reseat`'s arguments.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from ray.util.placement_group import remove_placement_group

from raytron.actors.group import ActorGroup, chairs_of
from raytron.actors.members import Chair, Member, living_nodes
from raytron.actors.placement import cluster, newcomers, place
from raytron.parallel.mesh import Mesh

__all__ = ["ElasticGroup"]

RENDEZVOUS_S = 120.0  # everyone is there already, started and idle


class ElasticGroup(ActorGroup):
    """See `ActorGroup`, whose arguments these are.

    Attributes:
        spares: members that stand by, started and connected to nothing.
        recruiting_s: what the members recruited last took to start, seats included.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.spares: list[Member] = []
        self.recruiting_s = 0.0
        self._vacant: list[Chair] = []
        self._lock = threading.Lock()  # of the vacant chairs
        self._recruiting = ThreadPoolExecutor(1, thread_name_prefix="recruiting")
        super().__init__(*args, **options)

    @property
    def vacant(self) -> tuple[Chair, ...]:
        """Chairs the group holds and nobody sits on."""
        return tuple(self._vacant)

    def member(self, name: str) -> Member | None:
        """The living member of that name."""
        return self._crew.get(name)

    def lose(self, names: Collection[str]) -> None:
        """End these members, whatever they are doing, and keep their chairs for others, unless the node is gone."""
        members = [self._crew[name] for name in names if name in self._crew]
        self._end(members)
        with self._lock:
            self._vacant += [member.chair for member in members]
        self.spares = [spare for spare in self.spares if spare.name not in names]
        self._tidy()

    def recruit(
        self,
        count: int,
        unit: Mesh | None = None,
        *,
        engine: Callable[[None], Any] | None = None,
        wait_s: float = 30.0,
        avoid: Collection[str] = (),
    ) -> Future[list[Member]]:
        """Start `count` members in the background, on vacant chairs first, then on new ones.

        Args:
            unit: ranks that new chairs are asked for together, one placement group for each; by default the mesh's.
            engine: `engine(None)` is what each of them then hosts; without it they host nothing until `create`.
            wait_s: how long to wait for the cluster to grant new chairs.
            avoid: nodes (ids) on which nothing new is to start.

        The future raises:
            CapacityError: the cluster does not grant the chairs.
            WorkerError: a newcomer did not start.
        """
        self._tidy()
        avoid = {*avoid, *(self.gone & living_nodes())}  # Ray would start them there
        with self._lock:
            free = [chair for chair in self._vacant if chair.seat.node not in avoid][:count]
            self._vacant = [chair for chair in self._vacant if chair not in free]
        unit = unit or Mesh(pp=self.mesh.pp, cp=self.mesh.cp, tp=self.mesh.tp)
        return self._recruiting.submit(self._recruit, free, count - len(free), unit, engine, wait_s, avoid)

    def reseat(self, mesh: Mesh, seated: Sequence[Member], leaving: Sequence[Member] = ()) -> None:
        """Meet under the next generation: `seated` are the ranks of `mesh`, and `leaving` take part in the move.

        Engines are not told. Everyone must be alive and have nothing under way.

        Raises:
            WorkerError, TimeoutError: someone did not come. The group is broken, and may be reseated again.
        """
        assert len(seated) == mesh.size, f"{len(seated)} members for {mesh.size} seats"
        for member in (*self.members, *leaving):
            member.rank = None
        for rank, member in enumerate(seated):
            member.rank = rank
        self.mesh, self.members = mesh, list(seated)
        self.spares = [spare for spare in self.spares if spare not in seated]
        self._connect(leaving)
        self._forget_calls(0.0)

    def dismiss(self, members: Sequence[Member]) -> None:
        """End members that sit nowhere, and give back the placement groups that nobody sits in any more."""
        assert not set(members) & set(self.members), "a seated member is lost or reseated first"
        self.lose([member.name for member in members])
        self._tidy(keep=False)

    def consult(self, members: Sequence[Member], method: str, *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """The engines' `method(*args)`, which talks to no peer: works in a broken group too.

        Raises:
            WorkerError, TimeoutError: someone failed or did not answer. Nobody is told.
        """
        return self._tell(members, "consult", lambda _: (method, *args), name=method, aside=True).results(timeout_s)

    def reshape(self, change: Any, leaving: Sequence[Member] = ()) -> list[Any]:
        """The engines' `reshape` (see `Worker.reshape`): what those who are seated returned, then the leaving ones."""
        everyone = [*self.members, *leaving]
        return self._tell(everyone, "reshape", lambda at: (everyone[at].name, change)).results()

    def restart(self) -> list[Any]:
        """The engines' `restart(world)`, on the seats they have now."""
        return self._fan_out("restart", None, lambda _: ()).results()

    def shutdown(self, close_s: float | None = None) -> None:
        """See `ActorGroup.shutdown`."""
        super().shutdown(close_s)
        self._recruiting.shutdown(cancel_futures=True)

    def _open_store(self) -> dist.TCPStore:
        return dist.TCPStore("0.0.0.0", 0, None, True, wait_for_workers=False)  # a group of one may grow

    def _recruit(
        self,
        chairs: list[Chair],
        more: int,
        unit: Mesh,
        engine: Callable[[None], Any] | None,
        wait_s: float,
        avoid: Collection[str],
    ) -> list[Member]:
        start = time.perf_counter()
        with self._returning(chairs):
            if more:
                chairs += self._take(more, unit, wait_s, avoid)
            new = self._hire(chairs, [None] * len(chairs))
            with self._ending(new):
                if engine is not None:
                    self._tell(new, "stand_by", lambda _: (engine,), aside=True).results(self._start_s)
                if self._closed:
                    raise RuntimeError("the group was shut down meanwhile")
            self.recruiting_s = time.perf_counter() - start
            return new

    def _take(self, count: int, unit: Mesh, wait_s: float, avoid: Collection[str]) -> list[Chair]:
        """New chairs."""
        mesh = newcomers(count, unit, self.each, [node for node in cluster() if node.id not in avoid])
        placement = place(mesh, self.each, strategy=self._strategy, wait_s=wait_s, avoid=avoid)
        self._groups |= {group.id: group for group in placement.groups}
        if self._closed:
            placement.remove()
            raise RuntimeError("the group was shut down meanwhile")
        return chairs_of(placement)

    @contextmanager
    def _returning(self, chairs: list[Chair]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with self._lock:
                self._vacant += chairs
            raise

    @contextmanager
    def _ending(self, members: list[Member]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._end(members)
            raise

    def _tidy(self, keep: bool = True) -> None:
        """Give back the placement groups that nobody sits in: all of them, or with `keep` those on lost nodes."""
        used, living = {member.chair.group.id for member in self._crew.values()}, living_nodes() - self.gone
        vacant: dict[Any, list[Chair]] = {}
        with self._lock:
            for chair in self._vacant:
                vacant.setdefault(chair.group.id, []).append(chair)
            for group_id, chairs in vacant.items():
                if group_id in used or (keep and all(chair.seat.node in living for chair in chairs)):
                    continue
                remove_placement_group(chairs[0].group)
                self._groups.pop(group_id, None)
                self._vacant = [chair for chair in self._vacant if chair not in chairs]

    def _connect(self, leaving: Sequence[Member] = ()) -> None:
        self.generation, self.broken = self.generation + 1, None
        everyone, address = [*self.members, *leaving], self._address()
        mesh = Mesh(dp=len(everyone)) if leaving else None

        def seat(at: int) -> tuple:
            member = everyone[at]
            seat = (self.mesh if member.rank is not None else None, member.rank)
            return (*seat, address, self.generation, self._timeout_s, member.devices.name, mesh and (mesh, at))

        self._tell(everyone, "connect", seat).results(min(self._start_s, RENDEZVOUS_S))
