"""Carrying out a decision: newcomers, a new generation, the move of what the ranks hold, and what each took.

    fault:   survey -> standings -> resolve -> conclude -> [ decide ] -> recruit -> reseat -> reshape -> adopt
    planned:                                   [ decide ] -> (recruited meanwhile) -> reseat -> reshape -> adopt

What the ranks held stays valid until all of them have the whole of what is new (reshape.py); so a second fault on the
way is met from the same sources, by the same seating.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from raytron.actors.failures import DIED, GONE
from raytron.actors.members import SILENT_S, Member, ended, ready, survey
from raytron.actors.policy import Decision, Rewind, Shrink, Unit
from raytron.actors.reseating import ElasticGroup
from raytron.actors.seating import seating
from raytron.parallel.mesh import Mesh
from raytron.training.commit import Resolution, Standing, resolve
from raytron.training.reshape import Change, Moved
from raytron.training.seating import Seating

__all__ = ["Job", "Mover", "Spent", "Survivors", "told_sources"]

TORN = "torn"  # it lives, but stopped in the middle of its update
TOLD = 64  # ranks whose sources are written down at a move


@dataclass(frozen=True)
class Job:
    """What an elastic group hosts.

    Attributes:
        newcomer: `newcomer(None)` is the task of a rank that joins, empty.
        covered: whether those of a seating who are not lost hold everything, given what they concluded.
        seat: a seating of a mesh of another shape, by those who are left and spares, that moves little.
        fits: whether the model can be cut into tp x pp parts.
    """

    newcomer: Callable[[None], Any]
    covered: Callable[[Seating, frozenset[str], Resolution], bool]
    seat: Callable[[Seating, frozenset[str], Mesh, Sequence[str]], Seating]
    fits: Callable[[int, int], bool]


@dataclass(frozen=True)
class Survivors:
    """What is left after a fault: who is lost and how, what the others concluded, and whether they hold everything."""

    lost: Mapping[str, str]
    resolution: Resolution | None
    covered: bool


@dataclass
class Spent:
    """Seconds of each part of a recovery or a change, in order; bytes as `plan` counts them; where each rank's came
    from (`told_sources`)."""

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_moved: int = 0
    bytes_local: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what the block takes to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def told(self) -> dict[str, Any]:
        """JSON-ready."""
        parts = {f"{part}_s": round(seconds, 4) for part, seconds in self.seconds.items()}
        return parts | {"bytes_moved": self.bytes_moved, "bytes_local": self.bytes_local, "sources": self.sources}


def told_sources(places: Sequence[str], moved: Sequence[Moved]) -> list[dict[str, Any]]:
    """By rank: its place, and the bytes it got by (kind, place) of their source; JSON-ready, and at most `TOLD` ranks,
    those first that got most from others."""
    rows = []
    for rank, (place, one) in enumerate(zip(places, moved, strict=True)):
        came = [[kind, source, count] for kind, source, count in sorted(one.sources, key=lambda s: -s[2])]
        rows.append({"rank": rank, "place": place, "from": came})
    got = {row["rank"]: sum(count for kind, _, count in row["from"] if kind != "own") for row in rows}
    return sorted(sorted(rows, key=lambda row: -got[row["rank"]])[:TOLD], key=lambda row: row["rank"])


class Mover:
    """Moves `group` from seating to seating.

    Attributes:
        seating: the last one that was adopted; its living members hold the run.
        nodes: of every member there ever was, by name.
    """

    def __init__(self, group: ElasticGroup, job: Job) -> None:
        self._group, self._job = group, job
        self.seating = Seating(group.mesh, tuple(member.name for member in group.members))
        self.nodes: dict[str, str] = {}
        self._decided = False  # that `seating` is what counts, though not everyone may have heard it
        self._empty = False  # the last beginning from a checkpoint was cut off: nobody holds anything
        self._know(group.members)

    def survivors(self, spent: Spent, patience_s: float = SILENT_S) -> Survivors:
        """Find out who is left, and have all of them be of one version. The group is broken."""
        places = self.seating.places
        with spent.timed("survey"):
            self._restore_spares()
            members = [member for place in places if (member := self._group.member(place))]
            asked = [*members, *self._group.spares]
            gone = survey(asked, patience_s, self._group.gone)
            lost = {place: DIED for place in places if self._group.member(place) is None}
            lost |= {place: how for place, how in gone.items() if place in places}
            self._group.gone |= {member.where.node for member in asked if gone.get(member.name) == GONE}
            self._group.lose([spare.name for spare in self._group.spares if spare.name in gone])
        with spent.timed("release"):
            alive = [member for member in members if member.name not in lost]
            if self._empty:
                return Survivors(lost, None, covered=False)
            if self._decided:
                self._adopt(alive)
            standings = self._standings(alive)
            lost |= {member.name: TORN for member, standing in standings.items() if standing.phase == "update"}
            resolution = self._conclude({m: s for m, s in standings.items() if m.name not in lost})
        covered = resolution is not None and self._job.covered(self.seating, frozenset(lost), resolution)
        return Survivors(lost, resolution, covered)

    def missing(self, decision: Decision) -> int:
        """How many newcomers the decision needs, spares included."""
        stay = [place for place in self.seating.places if place not in decision.leave and self._group.member(place)]
        return max(0, decision.mesh.size - len(stay))

    def carry_out(self, decision: Decision, survivors: Survivors | None, spent: Spent) -> None:
        """Seat everyone as decided, and move what they hold; spares fill what `missing` says.

        Raises:
            WorkerError, TimeoutError: another fault. `seating` is as before, and so is what its members hold.
        """
        old, lost = self.seating, frozenset(survivors.lost if survivors else ())
        new = self._seated(decision, lost)
        leaving = self._reseat(new, [place for place in old.places if place not in lost], spent)
        everyone = (*new.places, *(member.name for member in leaving))
        index = {place: at for at, place in enumerate(everyone)} if leaving else None
        resolution = survivors.resolution if survivors else None
        with spent.timed("move"):
            moved: list[Moved] = self._group.reshape(Change(old, new, lost, resolution, index), leaving)
        spent.bytes_moved, spent.bytes_local = moved[0].bytes_moved, moved[0].bytes_local
        spent.sources = told_sources(new.places, moved[: new.mesh.size])
        self.seating, self._decided = new, True  # from here on the old engines are not needed, whoever dies
        with spent.timed("adopt"):
            self._adopt(self._group.members)
            self._group.dismiss(leaving)

    def start_over(self, decision: Decision, survivors: Survivors, spent: Spent) -> tuple[int, list[str]]:
        """Seat everyone as decided, and have all begin from the newest checkpoint: its step (0 where there is none),
        and what was wrong with newer ones."""
        new = self._seated(decision, frozenset(survivors.lost))
        self._reseat(new, (), spent)  # until then what the living hold may still be of use
        self.seating, self._empty = new, True
        with spent.timed("load"):
            found = self._group.restart()[0]
        self._empty = False
        self._group.dismiss([])
        return found

    def _standings(self, members: Sequence[Member]) -> dict[Member, Standing]:
        if not members:
            return {}
        try:
            return dict(zip(members, self._group.consult(members, "standing"), strict=True))
        except TimeoutError:  # something keeps an engine's thread that is no wait for a peer: it is as good as hung
            self._group.lose([member.name for member in members if self._busy(member)])
            raise

    def _busy(self, member: Member) -> bool:
        progress = member.worker.progress.remote()
        return not ready([progress], SILENT_S) or (not ended(progress) and ray.get(progress).method is not None)

    def _adopt(self, members: Sequence[Member]) -> None:
        self._group.consult(members, "adopt")
        self._decided = False

    def _conclude(self, standings: Mapping[Member, Standing]) -> Resolution | None:
        """What those who are left make of the step; None where nobody is."""
        if not standings:
            return None
        resolution = resolve(standings.values())
        self._group.consult(list(standings), "conclude", resolution)
        return resolution

    def _seated(self, decision: Decision, lost: Collection[str]) -> Seating:
        old, spares = self.seating, [spare.name for spare in self._group.spares]
        self._know(self._group.spares)
        out = frozenset(lost) | frozenset(decision.leave)
        if Unit.of(old.mesh) != Unit.of(decision.mesh) and self._one_place_is_as_good(decision.mesh, out):
            return self._job.seat(old, out, decision.mesh, spares)
        action = decision.action.then if isinstance(decision.action, Rewind) else decision.action
        units = action.units if isinstance(action, Shrink) else ()
        places = seating(old.mesh, old.places, decision.mesh, self.nodes, out=out, units=units, fresh=spares)
        return Seating(decision.mesh, places)

    def _one_place_is_as_good(self, mesh: Mesh, out: Collection[str]) -> bool:
        """Whether tensor-parallel groups need no looking after: no groups, or one node."""
        spares = [spare.name for spare in self._group.spares]
        places = [place for place in (*self.seating.places, *spares) if place not in out]
        return mesh.tp == 1 or len({self.nodes[place] for place in places}) == 1

    def _reseat(self, new: Seating, sources: Sequence[str], spent: Spent) -> list[Member]:
        """Meet as `new`; those of `sources` that have no seat there take part, and are returned. All others end."""
        with spent.timed("rendezvous"):
            seated = [self._group.member(place) for place in new.places]
            leaving = [self._group.member(place) for place in sources if place not in new.places]
            self._group.lose([place for place in self.seating.places if place not in (*new.places, *sources)])
            self._group.reseat(new.mesh, seated, leaving)
        return leaving

    def _restore_spares(self) -> None:
        """Members that a move seated which was then not adopted stand by again."""
        places = set(self.seating.places)
        again = [m for m in self._group.members if m.name not in places and self._group.member(m.name)]
        self._group.spares += [member for member in again if member not in self._group.spares]

    def _know(self, members: Sequence[Member]) -> None:
        self.nodes |= {member.name: member.where.node for member in members}
