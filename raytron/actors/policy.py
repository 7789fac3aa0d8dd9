"""What an elastic run should do next: a pure function from a recorded state to a decision with its reason.

    decide(ClusterState) -> Decision(action, reason, mesh, ...)

Something was lost     the cheapest of: fill the seats (spares, then cold starts), give up units and fill what remains;
                       else units of another shape; else wait for the cluster; else stop. Without coverage the same,
                       from the newest checkpoint.
A node is draining     the same before its deadline, with the leaving ranks still there to copy from.
The user asked         at the next step boundary.
Wrong numbers          whoever is faulty leaves, if somebody else can have the seat, or it can be done without.
A straggler            replaced only if what it costs the others within the horizon is twice what replacing it costs.
Seats appeared         grow at a boundary, but not right after a fault or another change of size; back to the preferred
                       shape when it has room.

"Cheapest" is counted in seconds of the whole job (policy_plans.py). So four ranks wait five seconds for a cold process,
and four thousand go on without it and let it join later; a fixed order of preference is wrong at one end or the other.
The global batch is the same in any mesh, so decisions are about speed and safety alone.

Records are in policy_state.py, counting in capacity.py; all that a controller needs can be had from here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from raytron.actors.capacity import flaky, supply, units_that_fit
from raytron.actors.policy_plans import (
    Plan,
    asked_for,
    cheapest,
    crosses,
    largest,
    other_shape,
    refusal,
    spares_to_start,
    standing,
    wanted,
    wanted_unit,
    worst_units,
)
from raytron.actors.policy_state import (
    Action,
    ClusterState,
    Continue,
    Decision,
    Draining,
    Fault,
    Grow,
    Lost,
    Replace,
    Request,
    Reshape,
    Rewind,
    Rules,
    Save,
    Shrink,
    Slow,
    Spare,
    Stop,
    Unit,
    Wait,
)
from raytron.parallel.mesh import Mesh

__all__ = [
    "Action",
    "ClusterState",
    "Continue",
    "Decision",
    "Draining",
    "Fault",
    "Grow",
    "Lost",
    "Replace",
    "Request",
    "Reshape",
    "Rewind",
    "Rules",
    "Save",
    "Shrink",
    "Slow",
    "Spare",
    "Stop",
    "Unit",
    "Wait",
    "asked_for",
    "decide",
    "refusal",
    "spares_to_start",
    "wanted",
]

WORTH_IT = 2.0  # what a straggler has to cost within the horizon, against what replacing it costs


def decide(state: ClusterState) -> Decision:
    """What to do now. No decision leads to a mesh outside the bounds or without room; every state has an answer."""
    places = set(state.places)
    if any(lost.place in places for lost in state.lost):
        return _recover(state)
    if state.disagree:
        why = "replicas hold different numbers and nobody knows whose are right, so from the checkpoint"
        return Decision(Rewind(Continue()), why, state.mesh)
    if found := _drain(state):
        return found
    if not state.at_boundary:
        return _keep(state, "within a step; planned changes wait for its end")
    return _asked(state) or _faulty(state) or _straggler(state) or _settle(state)


# ------------------------------------------------------------------------------------------------------- loss and drain


def _recover(state: ClusterState) -> Decision:
    cause, lost = _cause(state), tuple(lost.place for lost in state.lost)
    hung = tuple(lost.place for lost in state.lost if lost.how == "hung")
    if 0 <= state.max_failures <= state.recoveries:
        why = f"{cause}, and max_failures is {state.max_failures}"
        return Decision(Stop(why), why, state.mesh, hung, lost)
    plan, avoid = _way_out(state)
    if plan is None:
        action, reason = _wait(state, cause)
        return Decision(action, reason, state.mesh, hung, lost)
    action, reason = plan.action, f"{cause}: {_told(state, plan)}"
    if not state.covered or state.disagree:
        action, reason = Rewind(action), f"{reason}; the living do not hold all of the state, so from the checkpoint"
    leave = tuple(dict.fromkeys([*lost, *(state.places[rank] for rank in plan.leave)]))
    return Decision(action, reason, plan.mesh, hung, leave, avoid)


def _way_out(state: ClusterState) -> tuple[Plan | None, frozenset[str]]:
    """The best plan for what is lost, and for draining ranks with it if possible: the group meets again anyway."""
    lost, draining = {one.place for one in state.lost}, _draining(state)
    gone = frozenset(rank for rank, place in enumerate(state.places) if place in lost)
    also = gone | {rank for rank, node in enumerate(state.nodes) if node in draining}
    avoids = dict.fromkeys((flaky(state), frozenset()))  # better a node that fails often than none
    for way in (cheapest, other_shape):
        for leaving in dict.fromkeys((also, gone)):
            for avoid in avoids:
                if plan := way(state, leaving, avoid):
                    return plan, avoid | draining
    return None, frozenset()


def _wait(state: ClusterState, cause: str) -> tuple[Wait | Stop, str]:
    rules = state.rules
    waited = 0.0 if state.waiting_since_s is None else state.now_s - state.waiting_since_s
    need = f"{cause}, and the cluster has no room for {state.bounds[0]} ranks in whole replicas"
    if waited >= rules.wait_s:
        why = f"{need} after {waited:.0f} s"
        return Stop(why), why
    return Wait(min(rules.poll_s, rules.wait_s - waited)), f"{need}: waiting for nodes, {waited:.0f} s so far"


def _drain(state: ClusterState) -> Decision | None:
    """Leave draining nodes: at a boundary, or within a step whose end would come too late."""
    held = set(state.nodes)
    ours = [one for one in state.draining if one.node in held]
    if not ours:
        return None
    rest = min(one.deadline_s for one in ours) - state.now_s
    if not state.at_boundary and rest >= state.step_s + state.rules.move_s:
        return None
    nodes = frozenset(one.node for one in ours)
    leaving = frozenset(rank for rank, node in enumerate(state.nodes) if node in nodes)
    cause = f"{_named(sorted(nodes), 'node')} will be gone in {max(0.0, rest):.0f} s"
    beside = rest >= state.rules.cold_s + state.step_s
    for avoid in dict.fromkeys((flaky(state), frozenset())):
        if plan := cheapest(state, leaving, avoid, beside=beside) or other_shape(state, leaving, avoid):
            return _planned(state, plan, cause, avoid | _draining(state))
    told = max(one.since_s for one in ours)
    if state.saved_s < max(told, state.now_s - state.rules.horizon_s):
        return Decision(Save(), f"{cause}, and there is no room elsewhere: saving what would be lost", state.mesh)
    return _keep(state, f"{cause}, there is no room elsewhere, and a checkpoint is written")


# ------------------------------------------------------------------------------------------------------- at a boundary


def _asked(state: ClusterState) -> Decision | None:
    """A request that nothing has come after: met as soon as there is room, without waiting for quiet."""
    request = standing(state)
    if request is None or request.at_s <= max([state.resized_s, *(fault.at_s for fault in state.history)]):
        return None
    unit, asked = wanted_unit(state), f"the user asked for {_words(request)}"
    if unit == Unit.of(state.mesh):
        return _grow(state, asked) if wanted(state).dp > state.mesh.dp else None
    mesh = largest(state, unit, min(wanted(state).dp, units_that_fit(_all_seats(state), unit)))
    if mesh is None:
        return _keep(state, f"{asked}, and there is no room for tp {unit.tp} x pp {unit.pp} yet")
    return Decision(Reshape(mesh), asked, mesh, avoid=flaky(state) | _draining(state))


def _faulty(state: ClusterState) -> Decision | None:
    leaving = frozenset(rank for rank, place in enumerate(state.places) if place in state.faulty)
    if not leaving:
        return None
    avoid = flaky(state) | {state.nodes[rank] for rank in leaving}
    plan = cheapest(state, leaving, avoid, beside=True)
    cause = f"the numbers of {_named([state.places[rank] for rank in sorted(leaving)], 'place')} were wrong"
    return plan and _planned(state, plan, cause, avoid | _draining(state))


def _straggler(state: ClusterState) -> Decision | None:
    rules = state.rules
    slow = {one.place: one.score for one in state.slow if one.score >= rules.slow_score}
    leaving = frozenset(rank for rank, place in enumerate(state.places) if place in slow)
    if not leaving:
        return None
    names = [state.places[rank] for rank in sorted(leaving)]
    score = max(slow[name] for name in names)
    gain = min(rules.horizon_s, state.left_s) * (1 - 1 / score)
    avoid = flaky(state) | {state.nodes[rank] for rank in leaving}
    plan = cheapest(state, leaving, avoid, beside=True)
    if plan is None or gain <= WORTH_IT * plan.cost_s:
        return None
    cause = f"{_named(names, 'place')} needs up to {score:.2f} times the median and will cost {gain:.0f} s"
    return _planned(state, plan, cause, avoid | _draining(state))


def _settle(state: ClusterState) -> Decision:
    """Towards the size and shape that is wanted, as far as there is room, but not right after a fault or a change."""
    target, mesh = wanted(state), state.mesh
    same = Unit.of(target) == Unit.of(mesh)
    if same and target.dp < mesh.dp:
        units = sorted(worst_units(state, ())[: mesh.dp - target.dp])
        leave = tuple(place for rank, place in enumerate(state.places) if rank // mesh.unit in units)
        reason = f"{_goal(state)}; {mesh.size} are running"
        return Decision(Shrink(target.dp, tuple(units)), reason, target, leave=leave)
    if same and target.dp == mesh.dp:
        return _keep(state, f"all {mesh.size} ranks that are wanted are running")
    if (hold := _held_until(state) - state.now_s) > 0:
        return _keep(state, f"{_goal(state)}; no growing for {hold:.0f} s more, so soon after a fault or a change")
    found = _grow(state, _goal(state)) if same else _home(state, target)
    return found or _keep(state, f"{_goal(state)}; there is no room for more than the {mesh.size} that are running")


def _home(state: ClusterState, target: Mesh) -> Decision | None:
    """Back to the preferred shape once it has room for no fewer ranks (for any, if the user asked for it); till then
    grow in the present one."""
    unit, request = Unit.of(target), standing(state)
    mesh = largest(state, unit, min(target.dp, units_that_fit(_all_seats(state), unit)))
    asked = request is not None and (request.tp is not None or request.pp is not None)
    if mesh and (asked or mesh.size >= state.mesh.size):
        reason = f"there is room again for {mesh.dp} replicas of tp {unit.tp} x pp {unit.pp}"
        return Decision(Reshape(mesh), reason, mesh, avoid=flaky(state) | _draining(state))
    return _grow(state, _goal(state))


def _grow(state: ClusterState, cause: str) -> Decision | None:
    """As many more units as have room, if the run lasts long enough to gain by it."""
    unit, mesh, rules = Unit.of(state.mesh), state.mesh, state.rules
    room = units_that_fit(_new_seats(state), unit, crosses(state))
    target = largest(state, unit, min(wanted(state).size // unit.size, mesh.dp + room))
    if target is None or target.dp <= mesh.dp:
        return None
    gain = min(rules.horizon_s, state.left_s) * (1 - mesh.dp / target.dp)
    if gain <= rules.move_s:
        return _keep(state, f"{cause}; growing would gain {gain:.1f} s and cost {rules.move_s:.1f} s")
    reason = f"{cause}; {mesh.size} are running and there is room for {target.size}"
    return Decision(Grow(target.dp), reason, target, avoid=flaky(state) | _draining(state))


def _held_until(state: ClusterState) -> float:
    """When growing is allowed again; where faults come faster than `hold_s`, half their distance has to do."""
    times, hold = sorted(fault.at_s for fault in state.history)[-4:], state.rules.hold_s
    if len(times) > 1:
        hold = min(hold, (times[-1] - times[0]) / (len(times) - 1) / 2)
    return max([state.resized_s + state.rules.hold_s, *(at + hold for at in times)])


def _new_seats(state: ClusterState) -> Counter:
    """Seats by node that growing may use: what is free, and the spares beyond those to keep."""
    excess = max(0, len(state.spares) - state.rules.spares)
    there = supply(replace(state, spares=state.spares[:excess]), flaky(state))
    return Counter(there.warm) + Counter(there.cold)


def _all_seats(state: ClusterState) -> Counter:
    """Seats by node for another shape: those in use, and those that growing may use."""
    shut = _draining(state)
    return Counter(node for node in state.nodes if node not in shut) + _new_seats(state)


def _draining(state: ClusterState) -> frozenset[str]:
    return frozenset(one.node for one in state.draining)


# -------------------------------------------------------------------------------------------------------------- wording


def _keep(state: ClusterState, reason: str) -> Decision:
    return Decision(Continue(), reason, state.mesh)


def _planned(state: ClusterState, plan: Plan, cause: str, avoid: frozenset[str]) -> Decision:
    leave = tuple(state.places[rank] for rank in plan.leave)
    return Decision(plan.action, f"{cause}: {_told(state, plan)}", plan.mesh, leave=leave, avoid=avoid)


def _cause(state: ClusterState) -> str:
    said = []
    for how, text in (("node", "went with"), ("died", "died on"), ("hung", "hang on")):
        if ours := [lost for lost in state.lost if lost.how == how]:
            nodes = _named(sorted({lost.node for lost in ours}), "node")
            said.append(f"{_named([lost.place for lost in ours], 'place')} {text} {nodes}")
    return ", ".join(said)


def _goal(state: ClusterState) -> str:
    request, size = standing(state), wanted(state).size
    if request:
        return f"the user asked for {_words(request)}, which makes {size} ranks"
    return f"{size} ranks are wanted"


def _words(request: Request) -> str:
    named = (("{} ranks", request.num_workers), ("tp {}", request.tp), ("pp {}", request.pp))
    return ", ".join(text.format(value) for text, value in named if value is not None)


def _named(names: list[str], what: str) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{what}{'' if len(names) == 1 else 's'} {shown}"


def _told(state: ClusterState, plan: Plan) -> str:
    action = plan.action
    if isinstance(action, Reshape):
        mesh = action.mesh
        return f"no whole replica has room, so {mesh.dp} replicas of tp {mesh.tp} x pp {mesh.pp}"
    start = "cold starts" if action.source == "cold" else "warm places"
    price = f"(about {plan.cost_s:.1f} s of the job)"
    if isinstance(action, Replace):
        return f"{len(action.places)} seats go to {start} {price}"
    refilled = f", {len(action.places)} seats in them go to {start}" if action.places else ""
    return f"{state.mesh.dp} replicas become {action.dp}{refilled} {price}"
