"""What fits where: counting seats by node, for the elastic policy. Pure, and linear in ranks.

The one rule of place is that of placement.py: a tensor-parallel group stays on one node, unless it crosses nodes
already (then no node could hold it, and any seat does). Filling is greedy (a hole in its own node first, then whole
groups on the tightest node), which may miss a packing that exists but never invents one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import comb

from raytron.actors.policy_state import ClusterState, Unit
from raytron.parallel.mesh import Mesh

__all__ = ["Filled", "Supply", "fill", "flaky", "resized", "supply", "units_that_fit"]

UNLIKELY = 0.001  # less than this chance, and a node is no longer just unlucky


@dataclass(frozen=True)
class Supply:
    """Seats for newcomers by node: `warm` have a process waiting, `cold` are empty."""

    warm: Mapping[str, int]
    cold: Mapping[str, int]


@dataclass(frozen=True)
class Filled:
    """Which ranks were given to newcomers, and the seats left over."""

    ranks: tuple[int, ...]
    left: Mapping[str, int]


def resized(mesh: Mesh, dp: int, unit: Unit | None = None) -> Mesh | None:
    """`mesh` with `dp` replicas, of another shape where `unit` says so; None where its experts do not divide."""
    unit = unit or Unit.of(mesh)
    etp = None if mesh.etp == mesh.tp else mesh.etp
    try:
        return Mesh(dp, unit.pp, unit.cp, unit.tp, mesh.ep, etp)
    except ValueError:
        return None


def supply(state: ClusterState, avoid: Collection[str]) -> Supply:
    """Where newcomers could sit: not on nodes that are gone, draining or in `avoid`.

    The empty seat of a lost rank counts as long as its node lives.
    """
    shut = {lost.node for lost in state.lost if lost.how == "node"}
    shut |= {d.node for d in state.draining} | set(avoid)
    places = set(state.places)
    cold = Counter({node: seats for node, seats in state.free.items() if node not in shut and seats > 0})
    cold.update(lost.node for lost in state.lost if lost.node not in shut and lost.place in places)
    return Supply(Counter(spare.node for spare in state.spares if spare.node not in shut), cold)


def units_that_fit(seats: Mapping[str, int], unit: Unit, crossing: bool = False) -> int:
    """How many whole units find room in so many seats by node; with `crossing` a TP group may straddle nodes."""
    if crossing:
        return sum(seats.values()) // unit.size
    return sum(count // unit.tp for count in seats.values()) // (unit.pp * unit.cp)


def fill(
    mesh: Mesh, nodes: tuple[str, ...], leaving: Collection[int], units: Iterable[int], seats: Mapping[str, int]
) -> Filled | None:
    """Give the seats of the `leaving` ranks of `units` to newcomers; None if `seats` (by node) do not suffice.

    Where a rank's own node has no seat for it, its whole tensor-parallel group moves to a node that has.
    """
    left, ranks = Counter(seats), []
    whole, loose = [], []
    for group in sorted(_broken(mesh, leaving, units), key=lambda g: sum(r in leaving for r in g)):
        gone = [rank for rank in group if rank in leaving]
        home = nodes[group[0]]
        if any(nodes[rank] != home for rank in group):
            loose += gone
        elif left[home] >= len(gone):
            left[home] -= len(gone)
            ranks += gone
        else:
            whole.append(group)
    for group in whole:
        rooms = [(count, node) for node, count in left.items() if count >= len(group)]
        if not rooms:
            return None
        left[min(rooms)[1]] -= len(group)
        ranks += group
    if sum(left.values()) < len(loose):
        return None
    _take(left, len(loose))
    return Filled(tuple(sorted([*ranks, *loose])), +left)


def _broken(mesh: Mesh, leaving: Collection[int], units: Iterable[int]) -> list[range]:
    """The TP groups of `units` that a leaving rank is in."""
    kept = set(units)
    firsts = {rank - rank % mesh.tp for rank in leaving if rank // mesh.unit in kept}
    return [range(first, first + mesh.tp) for first in sorted(firsts)]


def _take(left: Counter, count: int) -> None:
    for node in sorted(left):
        taken = min(count, left[node])
        left[node] -= taken
        count -= taken


def flaky(state: ClusterState) -> frozenset[str]:
    """Nodes that nothing new should be started on: where a straggler was, or that fail more often than chance explains.

    A test of likelihood and not a mere count: where everything fails alike (one machine, a drill that kills at random)
    no node is worse than another, and avoiding all of them would starve the run.
    """
    rules = state.rules
    recent = [fault for fault in state.history if fault.at_s >= state.now_s - rules.flaky_window_s]
    found = {fault.node for fault in recent if fault.how == "slow"}
    faults = Counter(fault.node for fault in recent if fault.how != "slow")
    if suspects := {node: count for node, count in faults.items() if count >= rules.flaky_faults}:
        seats = Counter(state.nodes)
        seats.update(spare.node for spare in state.spares)
        seats.update({node: max(0, count) for node, count in state.free.items()})
        seats.update({node: 1 for node in faults if node not in seats})
        total, every = sum(faults.values()), sum(seats.values())
        found |= {node for node, count in suspects.items() if _chance(count, total, seats[node] / every) < UNLIKELY}
    return frozenset(found)


def _chance(count: int, total: int, share: float) -> float:
    """How likely at least `count` of `total` faults are on a node with that share of the seats, if all fail alike."""
    return sum(comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(count, total + 1))
