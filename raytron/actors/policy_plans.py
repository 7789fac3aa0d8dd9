"""What a run would like to be, and the ways to go on without some of its ranks, each with its price. Pure.

A way is: give up so many units, and fill the holes in the others from the living of those, from warm spares and,
only where these do not suffice, by cold starts. Its price is in seconds of the whole job: how long all stand still, and
the share of the ranks that is missing times how long it stays missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from raytron.actors.capacity import fill, flaky, resized, supply, units_that_fit
from raytron.actors.policy_state import ClusterState, Replace, Request, Reshape, Shrink, Unit
from raytron.parallel.mesh import Mesh

__all__ = [
    "Plan",
    "asked_for",
    "cheapest",
    "crosses",
    "largest",
    "other_shape",
    "refusal",
    "spares_to_start",
    "standing",
    "wanted",
    "wanted_unit",
    "worst_units",
]


@dataclass(frozen=True)
class Plan:
    """A way out, its price in seconds of the whole job, and the ranks whose places have no seat afterwards."""

    action: Replace | Shrink | Reshape
    mesh: Mesh
    leave: tuple[int, ...]
    cost_s: float


# --------------------------------------------------------------------------------------------------------------- wishes


def wanted(state: ClusterState) -> Mesh:
    """The mesh the run would have if there were room.

    The size is what the user asked for last, else the most that the bounds allow; the shape likewise, else the
    preferred one.
    """
    unit, most, request = wanted_unit(state), state.bounds[1], standing(state)
    if request and request.num_workers is not None:
        most = request.num_workers
    return largest(state, unit, most // unit.size) or state.mesh


def asked_for(state: ClusterState) -> tuple[int, ...]:
    """What to ask an autoscaler for: ranks that need a node together, of everything the run wants in all, what it has
    included. A tensor-parallel group each (a rank each where groups cross nodes already), then a spare each.

    Ray's requests are of totals too: what is asked for is kept, even while it is idle, and what is not may go.
    """
    mesh = wanted(state)
    together = 1 if crosses(state) else mesh.tp
    return (together,) * (mesh.size // together) + (1,) * state.rules.spares


def refusal(state: ClusterState, request: Request) -> str | None:
    """Why a request cannot be met whatever the cluster has, with what to do about it; None if it can."""
    unit = _shape(state, request)
    low, high = state.bounds
    size = request.num_workers if request.num_workers is not None else min(high // unit.size, state.most_dp) * unit.size
    allowed = dict.fromkeys((*state.shapes, Unit.of(state.mesh)))
    if unit not in allowed:
        shapes = ", ".join(f"tp {u.tp} x pp {u.pp}" for u in allowed)
        return f"tp {unit.tp} x pp {unit.pp} does not suit this model and memory; it may be {shapes}"
    if not low <= size <= high:
        return f"{size} ranks are outside the run's bounds {low} to {high} (scaling.num_workers)"
    if size % unit.size:
        return f"{size} ranks are not whole replicas of pp x cp x tp = {unit.size}; use a multiple of {unit.size}"
    if size // unit.size > state.most_dp:
        return (
            f"{size // unit.size} replicas are more than the {state.most_dp} sequences of a global batch; ask for less"
        )
    if resized(state.mesh, size // unit.size, unit) is None:
        return f"ep {state.mesh.ep} does not divide a stage of {size} ranks; ask for another number"
    return None


def standing(state: ClusterState) -> Request | None:
    """The request in force: one that cannot be met is as if it had not been made."""
    return state.requested if state.requested and refusal(state, state.requested) is None else None


def wanted_unit(state: ClusterState) -> Unit:
    """The shape that is asked for, else the preferred one."""
    return _shape(state, standing(state))


def _shape(state: ClusterState, request: Request | None) -> Unit:
    unit = state.shapes[0] if state.shapes else Unit.of(state.mesh)
    if request is None:
        return unit
    return Unit(request.pp or unit.pp, unit.cp, request.tp or unit.tp)


def largest(state: ClusterState, unit: Unit, dp: int) -> Mesh | None:
    """The largest mesh of at most `dp` such units that bounds, batch and experts allow; None if there is none."""
    most = min(dp, state.bounds[1] // unit.size, state.most_dp)
    meshes = (resized(state.mesh, size, unit) for size in range(most, _least(state, unit) - 1, -1))
    return next((mesh for mesh in meshes if mesh), None)


def _least(state: ClusterState, unit: Unit) -> int:
    return max(1, -(-state.bounds[0] // unit.size))


def spares_to_start(state: ClusterState) -> int:
    """How many spares to start now: what is missing to `rules.spares`, once nothing else wants the seats."""
    if state.lost or state.mesh.size < wanted(state).size:
        return 0
    room = sum(supply(state, flaky(state)).cold.values())
    return max(0, min(state.rules.spares - len(state.spares), room))


# ----------------------------------------------------------------------------------------------------------------- ways


def cheapest(
    state: ClusterState, leaving: frozenset[int], avoid: Collection[str], *, beside: bool = False
) -> Plan | None:
    """The cheapest way to go on without the `leaving` ranks, in units of the present shape; None if there is none.

    Args:
        avoid: nodes where nothing is to be started.
        beside: newcomers can start while the others train, so a cold start stalls nobody.
    """
    return min(_ways(state, leaving, avoid, beside), key=lambda plan: plan.cost_s, default=None)


def _ways(state: ClusterState, leaving: frozenset[int], avoid: Collection[str], beside: bool) -> Iterator[Plan]:
    mesh, there, worst = state.mesh, supply(state, avoid), worst_units(state, leaving)
    most = wanted(state).dp if Unit.of(mesh) == wanted_unit(state) else state.bounds[1] // mesh.unit
    shut = {one.node for one in state.draining} | set(avoid)
    broken = len({rank // mesh.unit for rank in leaving})
    for dropped in range(max(0, mesh.dp - most), mesh.dp - _least(state, Unit.of(mesh)) + 1):
        gone, kept = worst[:dropped], worst[dropped:]
        if not (target := resized(mesh, mesh.dp - dropped)):
            continue
        ranks = (rank for unit in gone for rank in range(unit * mesh.unit, (unit + 1) * mesh.unit))
        donors = Counter(state.nodes[rank] for rank in ranks if rank not in leaving and state.nodes[rank] not in shut)
        warm = donors + Counter(there.warm)
        for source, seats in (("spare", warm), ("cold", warm + Counter(there.cold))):
            if (filled := fill(mesh, state.nodes, leaving, kept, seats)) is None:
                continue
            places = tuple(state.places[rank] for rank in filled.ranks)
            action = Shrink(target.dp, tuple(sorted(gone)), places, source) if dropped else Replace(places, source)
            left = Counter(filled.left) + (Counter(there.cold) if source == "spare" else Counter())
            cost = _price(state, dropped, left, starts=source == "cold" and not beside, beside=beside)
            yield Plan(action, target, tuple(sorted(leaving | set(filled.ranks))), cost)
            break  # what needs no start is never dearer
        if dropped >= broken:  # nothing is left to fill: giving up more is never cheaper
            return


def _price(state: ClusterState, dropped: int, left: Counter, *, starts: bool, beside: bool) -> float:
    """Seconds of the whole job; `left` are the seats to grow again on."""
    rules = state.rules
    still = rules.cold_s if starts else rules.move_s if dropped or beside else rules.spare_s
    if not dropped:
        return still
    missing = min(rules.horizon_s, state.left_s)
    if units_that_fit(left, Unit.of(state.mesh), crosses(state)) >= dropped:
        still += rules.move_s
        missing = min(missing, rules.cold_s + rules.hold_s)
    return still + dropped / state.mesh.dp * missing


def worst_units(state: ClusterState, leaving: Collection[int]) -> list[int]:
    """Positions on the dp axis, the ones to give up first: those that lose most, then stragglers, then the last."""
    slow = {one.place for one in state.slow if one.score >= state.rules.slow_score}
    gone = Counter(rank // state.mesh.unit for rank in leaving)
    late = Counter(rank // state.mesh.unit for rank, place in enumerate(state.places) if place in slow)
    return sorted(range(state.mesh.dp), key=lambda unit: (-gone[unit], -late[unit], -unit))


def other_shape(state: ClusterState, gone: frozenset[int], avoid: Collection[str]) -> Plan | None:
    """Units of another shape without the ranks `gone`, on as many ranks as there can be; without cold starts if
    possible."""
    there = supply(state, avoid)
    living = Counter(node for rank, node in enumerate(state.nodes) if rank not in gone)
    warm = living + Counter(there.warm)
    for seats, still in ((warm, state.rules.move_s), (warm + Counter(there.cold), state.rules.cold_s)):
        rooms = [(unit, units_that_fit(seats, unit)) for unit in state.shapes if unit != Unit.of(state.mesh)]
        meshes = [mesh for unit, room in rooms if (mesh := largest(state, unit, room))]
        if meshes:
            mesh = max(meshes, key=lambda mesh: mesh.size)
            return Plan(Reshape(mesh), mesh, tuple(sorted(gone)), still)
    return None


def crosses(state: ClusterState) -> bool:
    """Whether a TP group of the mesh crosses nodes: then no node could hold one."""
    tp, nodes = state.mesh.tp, state.nodes
    return tp > 1 and any(nodes[rank] != nodes[rank - rank % tp] for rank in range(len(nodes)))
