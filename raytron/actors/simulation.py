"""A cluster without processes: carries decisions of the elastic policy out, and refuses those that do not fit.

It knows nodes, seats and who sits where, by the same rules as real placement: no node holds more than its seats, and a
tensor-parallel group sits on one node unless no node could hold one. What a decision says is done to the letter, with
`AssertionError` where that is impossible, so that tests can hold the policy to it and simulations of ten thousand ranks
run the very code that decides for four. Nothing is known here of time's price: who simulates adds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from raytron.actors.policy_state import (
    ClusterState,
    Continue,
    Decision,
    Draining,
    Fault,
    Grow,
    Lost,
    Replace,
    Reshape,
    Rewind,
    Rules,
    Save,
    Shrink,
    Spare,
    Stop,
    Wait,
)
from raytron.parallel.mesh import Mesh

__all__ = ["SimulatedCluster"]


class SimulatedCluster:
    """Ranks of `mesh` seated on nodes, in order, as tightly as they come.

    Args:
        capacity: node -> ranks it can hold.
        bounds: (fewest, most) ranks.
        rules: those of the policy.
        known: whatever else of a `ClusterState` stays the same, such as `shapes` or `most_dp`.

    Attributes:
        now_s: the time, moved by whoever simulates.
        seated: (place, node) by rank. spares, lost, draining, history: as in `ClusterState`.
        resized_s, waiting_since_s, recoveries: kept as a controller would.
    """

    def __init__(
        self, mesh: Mesh, capacity: Mapping[str, int], bounds: tuple[int, int], rules: Rules, **known: Any
    ) -> None:
        self.mesh, self.capacity, self.bounds, self.rules = mesh, dict(capacity), bounds, rules
        self.known, self.now_s, self.resized_s = known, 0.0, float("-inf")
        self.spares: list[Spare] = []
        self.lost: list[Lost] = []
        self.draining: list[Draining] = []
        self.history: list[Fault] = []
        self.waiting_since_s: float | None = None
        self.recoveries, self._made = 0, 0
        self.seated: list[tuple[str, str]] = []
        torn = max(self.capacity.values(), default=0) < mesh.tp  # no node can hold a group
        self.seated = self._groups(mesh.size // mesh.tp, mesh.tp, {}, Counter(self.capacity), torn)

    # ---- what happens

    def lose(self, places: Collection[str], how: str) -> None:
        """Processes die or hang."""
        known = {lost.place for lost in self.lost}
        self.lost += [Lost(place, node, how) for place, node in self.seated if place in places and place not in known]

    def lose_node(self, node: str) -> None:
        """A node goes, with all that is on it."""
        self.capacity.pop(node)
        self.lost = [lost for lost in self.lost if lost.node != node]
        self.lost += [Lost(place, at, "node") for place, at in self.seated if at == node]
        self.spares = [spare for spare in self.spares if spare.node != node]
        self.draining = [one for one in self.draining if one.node != node]

    def add_node(self, node: str, seats: int) -> None:
        """A node comes."""
        self.capacity[node] = seats

    def drain(self, node: str, notice_s: float) -> None:
        """A node is told to end."""
        self.draining.append(Draining(node, self.now_s + notice_s, self.now_s))

    def start_spares(self, count: int, avoid: Collection[str] = ()) -> None:
        """Start warm spares on free seats, as many as there are."""
        shut = {one.node for one in self.draining} | set(avoid)
        for node in [n for n, seats in self.free().items() if n not in shut for _ in range(seats)][: max(0, count)]:
            self.spares.append(Spare(self._name(), node))

    # ---- what is known

    def free(self) -> Counter:
        """Seats by node that nothing of the run holds; those of lost ranks are the run's."""
        taken = Counter(node for _, node in self.seated) + Counter(spare.node for spare in self.spares)
        return Counter({node: seats - taken[node] for node, seats in self.capacity.items() if seats > taken[node]})

    def state(self, **changes: Any) -> ClusterState:
        """What a controller would tell the policy."""
        places, nodes = (tuple(seat[at] for seat in self.seated) for at in (0, 1))  # much faster than zip(*seated)
        told = {
            "now_s": self.now_s,
            "mesh": self.mesh,
            "places": places,
            "nodes": nodes,
            "bounds": self.bounds,
            "free": dict(self.free()),
            "lost": tuple(self.lost),
            "draining": tuple(self.draining),
            "spares": tuple(self.spares),
            "history": tuple(self.history),
            "recoveries": self.recoveries,
            "waiting_since_s": self.waiting_since_s,
            "resized_s": self.resized_s,
            "rules": self.rules,
        }
        return ClusterState(**(told | self.known | changes))

    # ---- what is done

    def carry_out(self, decision: Decision, slow: Iterable[str] = ()) -> None:
        """Do what was decided; `slow` are the places known to be stragglers.

        Raises:
            AssertionError: it cannot be done.
        """
        action = decision.action.then if isinstance(decision.action, Rewind) else decision.action
        if isinstance(action, Wait):
            self.waiting_since_s = self.now_s if self.waiting_since_s is None else self.waiting_since_s
        if isinstance(action, Continue | Save | Wait | Stop):
            return
        self._remember({place for place in slow if place in decision.leave})
        torn = not isinstance(action, Reshape) and self._crossing(self.mesh.tp)
        if isinstance(action, Replace | Shrink):
            self._reseat(action, decision)
        elif isinstance(action, Grow):
            self._grow(action, decision)
        else:
            self._reshape(decision)
        if not isinstance(action, Replace):
            self.resized_s = self.now_s
        self.mesh, self.waiting_since_s = decision.mesh, None
        self._check(torn)

    def _check(self, torn: bool) -> None:
        assert len(self.seated) == self.mesh.size
        places = [place for place, _ in self.seated] + [spare.place for spare in self.spares]
        assert len(set(places)) == len(places), "a place sits twice"
        used = Counter(node for _, node in self.seated) + Counter(spare.node for spare in self.spares)
        crowded = [node for node, count in used.items() if count > self.capacity.get(node, 0)]
        assert not crowded, f"more ranks than seats on {crowded}"
        assert torn or not self._crossing(self.mesh.tp), "a TP group was torn"

    def _remember(self, slow: Collection[str]) -> None:
        self.recoveries += bool(self.lost)
        gone = [(one.node, one.how, one.place) for one in self.lost]
        gone += [(node, "slow", place) for place, node in self.seated if place in slow]
        for node, how in dict.fromkeys((node, how) for node, how, _ in gone):
            places = tuple(place for at, why, place in gone if (at, why) == (node, how))
            self.history.append(Fault(self.now_s, node, how, places))

    def _reseat(self, action: Replace | Shrink, decision: Decision) -> None:
        """Fill the seats of `action.places` in the units that stay."""
        unit, out = self.mesh.unit, set(action.units) if isinstance(action, Shrink) else set()
        seats = [seat for rank, seat in enumerate(self.seated) if rank // unit not in out]
        donors = [seat for rank, seat in enumerate(self.seated) if rank // unit in out]
        vacant, leave = set(action.places), set(decision.leave)
        assert vacant == {place for place, _ in seats} & leave, "the seats to fill are not those that are left"
        assert {one.place for one in self.lost} <= leave, "something lost keeps its seat"
        warm, cold = self._supply(decision, donors)
        self._leave(self._fill(seats, vacant, warm, cold if action.source == "cold" else Counter()), warm)

    def _fill(
        self, seats: list[tuple[str, str]], vacant: set[str], warm: dict[str, list[str]], cold: Counter
    ) -> list[tuple[str, str]]:
        tp, filled = self.mesh.tp, list(seats)
        firsts = range(0, len(seats), tp)
        holes = [[rank for rank in range(first, first + tp) if seats[rank][0] in vacant] for first in firsts]
        for gone in sorted(filter(None, holes), key=len):  # what stays of a group fixes its node: those come first
            first = gone[0] - gone[0] % tp
            torn = len({node for _, node in seats[first : first + tp]}) > 1
            node = self._node_for(tp, warm, cold) if len(gone) == tp and not torn else seats[first][1]
            for rank in gone:
                filled[rank] = self._sit(self._any(warm, cold) if torn else node, warm, cold)
        return filled

    def _grow(self, action: Grow, decision: Decision) -> None:
        tp, extra = self.mesh.tp, (action.dp - self.mesh.dp) * self.mesh.unit
        assert extra > 0, "growing to no more than there is"
        assert not self.lost, "growing with holes"
        excess = max(0, len(self.spares) - self.rules.spares)
        kept, self.spares = self.spares[excess:], self.spares[:excess]
        warm, cold = self._supply(decision, donors=())
        cold -= Counter(spare.node for spare in kept)
        groups = self._groups(extra // tp, tp, warm, cold, self._crossing(tp))
        self._leave([*self.seated, *groups], warm)
        self.spares += kept

    def _reshape(self, decision: Decision) -> None:
        mesh, gone = decision.mesh, {lost.place for lost in self.lost} | set(decision.leave)
        warm, cold = self._supply(decision, donors=())
        for place, node in self.seated:
            if place not in gone:
                warm.setdefault(node, []).insert(0, place)
        self._leave(self._groups(mesh.size // mesh.tp, mesh.tp, warm, cold, False), warm)

    def _supply(self, decision: Decision, donors: Iterable[tuple[str, str]]) -> tuple[dict[str, list[str]], Counter]:
        """Places that wait, and empty seats, by node; nothing on nodes that the decision avoids."""
        warm: dict[str, list[str]] = {}
        waiting = [(place, node) for place, node in donors if place not in decision.leave]
        for place, node in [*waiting, *((spare.place, spare.node) for spare in self.spares)]:
            if node not in decision.avoid:
                warm.setdefault(node, []).append(place)
        cold = self.free() + Counter(lost.node for lost in self.lost if lost.node in self.capacity)
        return warm, Counter({node: seats for node, seats in cold.items() if node not in decision.avoid})

    def _groups(
        self, count: int, tp: int, warm: dict[str, list[str]], cold: Counter, torn: bool
    ) -> list[tuple[str, str]]:
        """Seats of `count` TP groups, one after the other; `torn` ones sit anywhere."""
        seats = []
        for _ in range(count):
            node = None if torn else self._node_for(tp, warm, cold)
            seats += [self._sit(node or self._any(warm, cold), warm, cold) for _ in range(tp)]
        return seats

    def _crossing(self, tp: int) -> bool:
        """Whether TP groups straddle nodes."""
        nodes = [node for _, node in self.seated]
        return any(nodes[rank] != nodes[rank - rank % tp] for rank in range(len(nodes)))

    def _node_for(self, tp: int, warm: Mapping[str, list[str]], cold: Mapping[str, int]) -> str:
        rooms = {node: len(places) + cold.get(node, 0) for node, places in warm.items()}
        fits = [(room, node) for node, room in {**cold, **rooms}.items() if room >= tp]
        assert fits, f"no node has room for {tp} ranks"
        return min(fits)[1]

    def _any(self, warm: Mapping[str, list[str]], cold: Mapping[str, int]) -> str:
        node = next((node for node, held in (*warm.items(), *cold.items()) if held), None)
        assert node is not None, "no seat is left"
        return node

    def _sit(self, node: str, warm: dict[str, list[str]], cold: Counter) -> tuple[str, str]:
        if warm.get(node):
            return warm[node].pop(0), node
        assert cold[node] > 0, f"no seat is left on {node}"
        cold[node] -= 1
        return self._name(), node

    def _leave(self, seated: list[tuple[str, str]], warm: Mapping[str, list[str]]) -> None:
        """The new seating: who waits without a seat is a spare, who has left is gone."""
        held = {place for place, _ in seated}
        waiting = [Spare(place, node) for node, places in warm.items() for place in places]
        every = {spare.place: spare for spare in [*self.spares, *waiting]}
        self.spares = [spare for place, spare in every.items() if place not in held]
        self.seated, self.lost = seated, []

    def _name(self) -> str:
        self._made += 1
        return f"actor-{self._made - 1}"
