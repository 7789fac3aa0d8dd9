"""The number of rollout engines: properties of the decision, and where any sequence of events ends."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.actors.placement import Node
from raytron.actors.rollout_policy import EnginesState, Seated, decide, refusal
from raytron.actors.rollout_seats import engines_that_fit
from tests.test_import_order import ROOT, imported

NODES = ["a", "b", "c", "d"]


@st.composite
def states(draw) -> EnginesState:
    low = draw(st.integers(1, 3))
    seats = st.frozensets(st.sampled_from(NODES), max_size=2)
    known = draw(st.lists(st.tuples(seats, st.booleans(), st.integers(0, 100)), max_size=8))
    return EnginesState(
        engines=tuple(Seated(at, nodes, bool(nodes) and ready, work) for at, (nodes, ready, work) in enumerate(known)),
        bounds=(low, low + draw(st.integers(0, 4))),
        free=draw(st.integers(-2, 6)),
        draining=draw(st.dictionaries(st.sampled_from(NODES), st.sampled_from([-1.0, 3.0, 60.0, float("inf")]))),
        requested=draw(st.none() | st.integers(low, 8)),
        lost=draw(st.integers(0, 3)),
        held_s=draw(st.sampled_from([0.0, 5.0])),
    )


@given(states())
def test_no_decision_takes_the_last_that_answers_or_starts_what_may_not_be(state):
    decision = decide(state)
    assert decision.reason
    stay = [one for one in state.engines if not one.nodes & state.draining.keys()]
    assert decision.start <= max(0, state.free)
    assert not (decision.start and state.held_s > 0)
    if decision.start:
        assert len(stay) + decision.start <= max(0, state.bounds[1] - state.lost)
    left = [one for one in state.engines if one.engine not in decision.leave]
    assert len(set(decision.leave)) == len(state.engines) - len(left)
    if any(one.ready for one in state.engines):
        assert any(one.ready for one in left)
    assert (decision.kind == "continue") == (not decision.start and not decision.leave)


@given(states())
def test_those_that_leave_cost_the_least(state):
    state = replace(state, draining={})
    leave = decide(state).leave
    stay = [one for one in state.engines if one.engine not in leave]
    for gone in (one for one in state.engines if one.engine in leave):
        assert all((gone.ready, gone.outstanding) <= (one.ready, one.outstanding) for one in stay)


@dataclass
class Simulated:
    """Nodes of so many engines each, and engines that come up at once where there is room."""

    bounds: tuple[int, int]
    seats: dict[str, int]
    engines: dict[int, str] = field(default_factory=dict)
    draining: dict[str, float] = field(default_factory=dict)
    requested: int | None = None
    count: int = 0

    def free(self) -> list[str]:
        used = list(self.engines.values())
        stays = [node for node in self.seats if node not in self.draining]
        return [node for node in stays for _ in range(self.seats[node] - used.count(node))]

    def settle(self) -> None:
        """Ask and act until there is nothing to do."""
        for _ in range(6):
            engines = tuple(Seated(engine, frozenset([node])) for engine, node in self.engines.items())
            known = (engines, self.bounds, len(self.free()), self.draining, self.requested)
            decision = decide(EnginesState(*known))
            if decision.kind == "continue":
                return
            for engine in decision.leave:
                del self.engines[engine]
            for node in self.free()[: decision.start]:
                self.engines[self.count] = node
                self.count += 1
        raise AssertionError(f"no rest: {decision}")


EVENTS = st.tuples(st.sampled_from(["add", "lose", "drain", "ask"]), st.sampled_from(NODES), st.integers(1, 5))


@given(st.integers(1, 2), st.integers(0, 3), st.lists(EVENTS, max_size=12))
def test_after_any_events_there_are_as_many_engines_as_may_be_and_find_room(low, more, events):
    cluster = Simulated((low, low + more), {"a": 2})
    for event, node, number in events:
        if event == "add":
            cluster.seats.setdefault(node, number)
        elif event == "lose":
            cluster.seats.pop(node, None)
            cluster.draining.pop(node, None)
            cluster.engines = {engine: on for engine, on in cluster.engines.items() if on != node}
        elif event == "drain" and node in cluster.seats:
            cluster.draining[node] = 60.0
        elif event == "ask" and refusal(cluster.bounds, number) is None:
            cluster.requested = number
        cluster.settle()
        stays = sum(seats for on, seats in cluster.seats.items() if on not in cluster.draining)
        goal = min(cluster.requested or cluster.bounds[1], cluster.bounds[1])
        there = [on for on in cluster.engines.values() if on not in cluster.draining]
        assert len(there) == min(goal, stays)
        if len(there) >= low:
            assert len(cluster.engines) == len(there)  # nobody stays on a node that leaves while enough others answer


def test_a_drained_engine_goes_on_until_others_answer_or_its_time_is_up():
    on = [Seated(0, frozenset("a"), outstanding=10), Seated(1, frozenset("b"))]
    known = {"bounds": (2, 3), "draining": {"a": 120.0}}
    moving = decide(EnginesState(tuple(on), free=1, **known))
    assert (moving.start, moving.leave, moving.kind) == (1, (), "grow")
    assert "the node of engine 0 leaves in 120 s; 1 more start elsewhere; 1 others answer" in moving.reason
    on.append(Seated(2, frozenset("c"), ready=False))
    assert decide(EnginesState(tuple(on), **known)).kind == "continue"
    on[2] = Seated(2, frozenset("c"))
    assert decide(EnginesState(tuple(on), **known)).leave == (0,)
    late = decide(EnginesState(tuple(on[:2]), bounds=(2, 3), draining={"a": 20.0}))
    assert (late.leave, late.within_s) == ((0,), 15.0)
    alone = decide(EnginesState(tuple(on[:1]), bounds=(1, 3), draining={"a": 20.0}))
    assert alone.kind == "continue"


def test_what_failed_too_often_is_not_made_good():
    state = EnginesState((Seated(1, frozenset("a")),), (1, 3), free=9, lost=1)
    decision = decide(state)
    assert decision.start == 1
    assert "1 of which failed too often" in decision.reason
    assert decide(replace(state, lost=3)).kind == "continue"


@pytest.mark.parametrize(
    ("bounds", "engines", "why"),
    [
        ((1, 4), 4, None),
        ((1, 4), 5, "5 engines are outside rollout.engines 1 to 4"),
        ((2, 4), 1, "1 engines are outside"),
        ((2, 2), 1, "rollout.engines is 2, one number"),
    ],
)
def test_what_may_be_asked_for(bounds, engines, why):
    said = refusal(bounds, engines)
    assert (said is None) == (why is None)
    assert why is None or why in said


def test_engines_fit_where_all_their_bundles_do():
    def node(name: str, free: float) -> Node:
        return Node(name, name, {"CPU": 9.0}, {"CPU": free})

    nodes = [node("a", 3.0), node("b", 1.0)]
    assert engines_that_fit(nodes, [{"CPU": 1.0}], 9) == 4
    assert engines_that_fit(nodes, [{"CPU": 1.0}], 2) == 2
    assert engines_that_fit(nodes, [{"CPU": 2.0}], 9) == 1
    assert engines_that_fit(nodes, [{"CPU": 1.0}] * 2, 9) == 2  # two pipeline stages, wherever each finds room
    assert engines_that_fit(nodes, [{"CPU": 1.0, "GPU": 1.0}], 9) == 0


def test_the_policy_depends_on_nothing_outside_the_standard_library():
    file = ROOT / "raytron" / "actors" / "rollout_policy.py"
    names = {name.split(".")[0] for name, _ in imported(ast.parse(file.read_text()), "raytron.actors")}
    assert names <= sys.stdlib_module_names
    assert not names & {"time", "random", "datetime", "asyncio"}
