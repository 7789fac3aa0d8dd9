"""Elastic decisions as properties: held to the letter on a simulated cluster, over any sequence of events."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.actors.policy import (
    ClusterState,
    Continue,
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
    asked_for,
    decide,
    refusal,
    spares_to_start,
    wanted,
)
from raytron.actors.policy_costs import measured
from raytron.actors.simulation import SimulatedCluster
from raytron.parallel.mesh import Mesh
from tests.test_import_order import ROOT, imported

RULES = Rules()


def state(mesh: Mesh, per_node: int = 1, **known) -> ClusterState:
    """`mesh` with its ranks on nodes n0, n1, ... of so many seats each, places p0, p1, ..."""
    places = tuple(f"p{rank}" for rank in range(mesh.size))
    nodes = tuple(f"n{rank // per_node}" for rank in range(mesh.size))
    return ClusterState(
        **{"now_s": 1000.0, "mesh": mesh, "places": places, "nodes": nodes, "bounds": (1, mesh.size)} | known
    )


def lost(*ranks: int, how: str = "died", per_node: int = 1) -> tuple[Lost, ...]:
    return tuple(Lost(f"p{rank}", f"n{rank // per_node}", how) for rank in ranks)


# ------------------------------------------------------------------------------------------- any sequence of events


@st.composite
def clusters(draw) -> SimulatedCluster:
    tp, pp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    mesh = Mesh(dp=dp, pp=pp, tp=tp)
    per_node = draw(st.sampled_from([size for size in (1, 2, 4, 6) if size >= tp]))
    used = -(-mesh.size // (per_node // tp * tp))
    capacity = {f"node-{at}": per_node for at in range(used + draw(st.integers(0, 2)))}
    bounds = (draw(st.integers(1, mesh.size)), mesh.size + draw(st.integers(0, 2)) * mesh.unit)
    others = st.builds(Unit, st.integers(1, 2), st.just(1), st.sampled_from([1, 2]))
    shapes = [Unit(pp, 1, tp), *draw(st.lists(others))]
    rules = Rules(spares=draw(st.integers(0, 1)), cold_s=draw(st.sampled_from([0.5, 5.0, 60.0])))
    cluster = SimulatedCluster(mesh, capacity, bounds, rules, shapes=tuple(dict.fromkeys(shapes)))
    cluster.start_spares(rules.spares)
    return cluster


EVENTS = st.sampled_from(["die", "hang", "node", "add", "drain", "slow", "scale", "reshape", "pause", "uncovered"])


def happen(cluster: SimulatedCluster, event: str, draw) -> dict:
    """Let something happen; what else the policy is told this time."""
    nodes, places = sorted(cluster.capacity), [place for place, _ in cluster.seated]
    if event in ("die", "hang"):
        chosen = draw(st.sets(st.sampled_from(places), min_size=1, max_size=3))
        cluster.lose(chosen, {"die": "died", "hang": "hung"}[event])
    elif event in ("node", "uncovered") and nodes:
        cluster.lose_node(draw(st.sampled_from(nodes)))
        return {"covered": event != "uncovered"}
    elif event == "add":
        name = f"node-{len(nodes)}-{cluster.now_s:.0f}-{draw(st.integers(0, 9))}"
        cluster.capacity.setdefault(name, draw(st.sampled_from([1, 2, 4])))
    elif event == "drain" and nodes:
        cluster.drain(draw(st.sampled_from(nodes)), notice_s=draw(st.sampled_from([0.1, 30.0])))
    elif event == "slow":
        return {"slow": (Slow(draw(st.sampled_from(places)), draw(st.sampled_from([1.1, 1.5, 4.0]))),)}
    elif event in ("scale", "reshape"):
        size = draw(st.integers(1, 20)) if event == "scale" else None
        unit = draw(st.sampled_from(cluster.known["shapes"])) if event == "reshape" else None
        cluster.known["requested"] = Request(size, unit and unit.tp, unit and unit.pp, cluster.now_s)
    elif event == "pause":
        cluster.now_s += draw(st.sampled_from([1.0, 11.0, 4000.0]))
    return {}


def settle(cluster: SimulatedCluster, **told) -> list:
    """Ask and act until there is nothing to do; the decisions."""
    made = []
    for _ in range(8):
        seen = cluster.state(**told)
        decision = decide(seen)
        assert decision == decide(seen)
        hold(cluster, seen, decision)
        cluster.carry_out(decision, slow=[one.place for one in seen.slow])
        made.append(decision)
        if isinstance(decision.action, Continue | Save | Wait | Stop):
            return made
        told = {}  # a straggler that was left is none any more, and a rewound run is whole again
    raise AssertionError(f"no end to it: {[decision.reason for decision in made]}")


def hold(cluster: SimulatedCluster, seen: ClusterState, decision) -> None:
    """What is true of every single decision; that it fits, `carry_out` checks."""
    changes = not isinstance(decision.action, Continue | Save | Wait | Stop)
    if changes and decision.mesh != seen.mesh:
        assert seen.bounds[0] <= decision.mesh.size <= seen.bounds[1]
        assert Unit.of(decision.mesh) in (*seen.shapes, Unit.of(seen.mesh))
    assert decision.reason
    if seen.lost:
        assert not isinstance(decision.action, Continue | Grow | Save)
        assert isinstance(decision.action, Rewind) == (changes and not seen.covered)
        assert seen.lost[0].node in decision.reason or len({one.node for one in seen.lost}) > 3
        assert set(decision.end) == {one.place for one in seen.lost if one.how == "hung"}
    else:
        assert not isinstance(decision.action, Wait | Stop | Rewind)
    if isinstance(decision.action, Grow):
        asked = seen.requested.at_s if seen.requested else -1.0
        last = max([seen.resized_s, *(fault.at_s for fault in seen.history)])
        assert asked > last or seen.resized_s + seen.rules.hold_s <= seen.now_s


@settings(max_examples=100, deadline=None)
@given(clusters(), st.data())
def test_any_sequence_of_events_has_its_answer(cluster: SimulatedCluster, data):
    for event in data.draw(st.lists(EVENTS, min_size=1, max_size=6)):
        told = happen(cluster, event, data.draw)
        last = settle(cluster, **told)[-1].action
        if isinstance(last, Stop):
            return
        assert bool(cluster.lost) == isinstance(last, Wait)
        if isinstance(last, Wait):  # nothing whole has room: otherwise it would not wait
            seats = {node: len([s for s in cluster.seated if s[1] == node]) for node in cluster.capacity}
            seats |= {n: seats[n] + cluster.free()[n] for n in seats}
            seats |= {n: seats[n] + sum(spare.node == n for spare in cluster.spares) for n in seats}
            seats |= {one.node: 0 for one in cluster.draining}
            for unit in (*cluster.known["shapes"], Unit.of(cluster.mesh)):
                room = sum(count // unit.tp for count in seats.values()) // unit.pp * unit.size
                assert room < -(-cluster.bounds[0] // unit.size) * unit.size
            return


@settings(max_examples=40, deadline=None)
@given(clusters(), st.data())
def test_a_quiet_cluster_comes_to_rest_and_stays_there(cluster: SimulatedCluster, data):
    for event in data.draw(st.lists(EVENTS, min_size=1, max_size=4)):
        if isinstance(settle(cluster, **happen(cluster, event, data.draw))[-1].action, Wait | Stop):
            return
    meshes = []
    for _ in range(12):
        cluster.now_s += RULES.hold_s + 1
        settle(cluster)
        meshes.append(cluster.mesh)
    changes = [(before, after) for before, after in pairwise(meshes) if before != after]
    assert len(changes) <= 3, changes
    assert len(set(meshes)) == len(changes) + 1, f"back and forth: {changes}"


@settings(max_examples=40, deadline=None)
@given(clusters(), st.data())
def test_draining_nodes_are_left_while_there_is_room(cluster: SimulatedCluster, data):
    node = data.draw(st.sampled_from(sorted(cluster.capacity)))
    cluster.drain(node, notice_s=60.0)
    last = settle(cluster)[-1].action
    if any(at == node for _, at in cluster.seated):
        assert isinstance(last, Save)
        cluster.now_s += 1
        (then,) = settle(cluster, saved_s=cluster.now_s)
        assert isinstance(then.action, Continue)
    else:
        cluster.lose_node(node)
        assert not cluster.lost


@settings(max_examples=60, deadline=None)
@given(clusters(), st.data())
def test_what_is_asked_of_an_autoscaler_is_what_is_wanted_and_suffices(cluster: SimulatedCluster, data):
    for event in data.draw(st.lists(EVENTS, max_size=3)):
        if isinstance(settle(cluster, **happen(cluster, event, data.draw))[-1].action, Wait | Stop):
            return
    seen = cluster.state()
    target, asked = wanted(seen), asked_for(seen)
    assert sum(asked) == target.size + seen.rules.spares
    assert set(asked) <= {1, target.tp}
    assert seen.bounds[0] <= target.size <= seen.bounds[1]
    for at, ranks in enumerate(asked):  # whatever else is there, an autoscaler adds all of it
        cluster.capacity[f"asked-{at}"] = ranks
    for _ in range(4):
        cluster.now_s += RULES.hold_s + 1
        settle(cluster)
    assert cluster.mesh == target
    assert asked_for(cluster.state()) == asked  # it goes on asking, or its nodes would be taken away


@pytest.mark.parametrize("request_", [Request(num_workers=2, at_s=999.0), None])
def test_less_is_asked_for_once_less_is_wanted(request_):
    one = state(Mesh(dp=4, tp=2), per_node=2, bounds=(2, 12), requested=request_)
    assert asked_for(one) == (2,) * (1 if request_ else 6)
    assert asked_for(replace(one, lost=lost(0, 1), waiting_since_s=990.0)) == asked_for(one)
    assert asked_for(replace(one, rules=Rules(spares=1)))[-1] == 1


# ------------------------------------------------------------------------------------------------------ single rules


def test_a_spare_comes_before_a_cold_start():
    one = state(Mesh(dp=4), lost=lost(2), spares=(Spare("s", "n9"),), free={"n8": 1})
    decision = decide(one)
    assert decision.action == Replace(("p2",), "spare")
    assert decision.leave == ("p2",)
    assert "p2" in decision.reason
    assert "n2" in decision.reason


def test_few_ranks_wait_for_a_cold_start_and_many_go_on_without():
    for size, expected in ((2, Replace), (4, Replace), (64, Shrink), (4096, Shrink)):
        decision = decide(state(Mesh(dp=size), lost=lost(1)))
        assert isinstance(decision.action, expected), (size, decision)


def test_with_no_seat_it_shrinks_by_the_broken_unit():
    decision = decide(state(Mesh(dp=4, tp=2), per_node=2, lost=lost(2, 3, how="node", per_node=2)))
    assert decision.action == Shrink(3, (1,))
    assert decision.mesh == Mesh(dp=3, tp=2)


def test_the_living_of_a_broken_unit_mend_another():
    # Ranks 0 and 3 are gone with their nodes: the living of unit 1 takes the seat of rank 0.
    decision = decide(state(Mesh(dp=3, pp=2), lost=lost(0, 3, how="node")))
    assert decision.action == Shrink(2, (1,), ("p0",))


def test_a_tensor_parallel_group_moves_as_one():
    one = state(Mesh(dp=2, tp=2), per_node=2, bounds=(4, 4), lost=lost(1, per_node=2), free={"n7": 2})
    assert decide(one).action == Replace(("p1",), "cold")  # its own seat is empty
    bad = tuple(Fault(900.0 + i, "n0", "died") for i in range(9))
    decision = decide(replace(one, history=bad))
    assert decision.action == Replace(("p0", "p1"), "cold")
    assert set(decision.leave) == {"p0", "p1"}
    assert "n0" in decision.avoid


def test_a_bad_node_is_better_than_none():
    bad = tuple(Fault(900.0 + i, "n1", "died") for i in range(12))
    decision = decide(state(Mesh(dp=2), bounds=(2, 2), lost=lost(1), history=bad))
    assert decision.action == Replace(("p1",), "cold")
    assert "n1" not in decision.avoid


def test_nodes_that_all_fail_alike_are_none_the_worse():
    faults = tuple(Fault(900.0 + i, f"n{i % 4}", "died") for i in range(40))
    decision = decide(state(Mesh(dp=3), nodes=("n0", "n1", "n2"), bounds=(1, 4), free={"n3": 1}, history=faults))
    assert decision.action == Grow(4)
    assert not decision.avoid


def test_a_few_faults_in_a_row_are_chance_on_few_nodes_and_none_on_many():
    three = tuple(Fault(900.0 + i, "n1", "died") for i in range(3))
    for nodes, avoided in ((2, False), (4, False), (64, True)):
        one = state(Mesh(dp=nodes), bounds=(1, 2 * nodes), free={f"n{i}": 1 for i in range(nodes)}, history=three)
        assert ("n1" in decide(one).avoid) == avoided, nodes


def test_another_shape_only_where_no_whole_unit_fits():
    shapes = (Unit(pp=2, tp=2), Unit(pp=1, tp=2), Unit(pp=1, tp=1))
    one = state(Mesh(pp=2, tp=2), per_node=2, bounds=(1, 4), shapes=shapes, lost=lost(2, 3, how="node", per_node=2))
    assert decide(one).action == Reshape(Mesh(tp=2))
    assert decide(replace(one, free={"n5": 2})).action == Replace(("p2", "p3"), "cold")
    back = state(Mesh(tp=2), per_node=2, bounds=(1, 4), shapes=shapes, free={"n5": 2})
    assert decide(back).action == Reshape(Mesh(pp=2, tp=2))


def test_it_waits_for_the_cluster_and_stops_at_last():
    one = state(Mesh(dp=2), bounds=(2, 2), lost=lost(1, how="node"))
    assert decide(one).action == Wait(RULES.poll_s)
    assert decide(replace(one, waiting_since_s=1000.0 - RULES.wait_s + 0.25)).action == Wait(0.25)
    late = decide(replace(one, waiting_since_s=1000.0 - RULES.wait_s))
    assert isinstance(late.action, Stop)
    assert "n1" in late.action.why


def test_failures_are_counted_and_drains_are_not():
    one = state(Mesh(dp=2), lost=lost(1), max_failures=2, recoveries=1)
    assert isinstance(decide(one).action, Replace)
    assert isinstance(decide(replace(one, recoveries=2)).action, Stop)
    drained = replace(one, lost=(), recoveries=2, draining=(Draining("n1", 1100.0, 999.0),), free={"n5": 1})
    assert decide(drained).action == Replace(("p1",), "cold")


def test_without_coverage_the_state_comes_from_the_checkpoint():
    decision = decide(state(Mesh(dp=2), lost=lost(1), covered=False))
    assert decision.action == Rewind(Replace(("p1",), "cold"))
    assert "checkpoint" in decision.reason


def test_a_hung_rank_is_ended_first():
    decision = decide(state(Mesh(dp=2), lost=lost(0, how="hung")))
    assert (decision.end, decision.leave) == (("p0",), ("p0",))


def test_nothing_planned_happens_within_a_step():
    within = state(Mesh(dp=2), bounds=(1, 4), free={"n5": 2}, at_boundary=False, step_s=2.0)
    assert decide(within).action == Continue()
    assert decide(replace(within, at_boundary=True)).action == Grow(4)
    far, near = (Draining("n1", 1000.0 + rest, 990.0) for rest in (60.0, 1.5))
    assert decide(replace(within, draining=(far,))).action == Continue()
    assert isinstance(decide(replace(within, draining=(near,))).action, Replace | Shrink)


def test_a_draining_node_goes_with_the_lost_one():
    decision = decide(state(Mesh(dp=4), lost=lost(1), draining=(Draining("n2", 1030.0, 999.0),), free={"n9": 2}))
    assert set(decision.leave) == {"p1", "p2"}
    assert "n2" in decision.avoid


def test_a_draining_node_with_nowhere_to_go_does_not_keep_a_lost_rank_from_its_seat():
    decision = decide(state(Mesh(dp=4), bounds=(4, 4), lost=lost(1), draining=(Draining("n2", 1030.0, 999.0),)))
    assert decision.action == Replace(("p1",), "cold")


def test_the_preferred_shape_comes_back_without_losing_ranks_unless_the_user_asked_for_it():
    one = state(Mesh(dp=6), per_node=4, bounds=(1, 8), shapes=(Unit(tp=4), Unit()))
    assert decide(one).action == Continue()  # there is room for one replica of four
    assert decide(replace(one, requested=Request(tp=4, at_s=1.0), resized_s=100.0)).action == Reshape(Mesh(tp=4))


@pytest.mark.parametrize("since_s", [990.0, float("-inf")])
def test_what_a_draining_node_takes_along_is_saved_once_and_again_when_it_is_old(since_s: float):
    one = state(Mesh(dp=2), bounds=(2, 2), draining=(Draining("n1", 9000.0, since_s),))
    assert decide(one).action == Save()
    assert decide(replace(one, saved_s=995.0)).action == Continue()
    assert decide(replace(one, saved_s=995.0, now_s=995.0 + RULES.horizon_s + 1)).action == Save()


def test_a_straggler_is_replaced_when_it_costs_more_than_its_replacement():
    slow = state(Mesh(dp=4), slow=(Slow("p3", 1.5),), free={"n9": 1})
    assert decide(slow).action == Replace(("p3",), "cold")
    assert "p3" in decide(slow).reason
    assert decide(replace(slow, left_s=5.0)).action == Continue()  # soon done
    assert decide(replace(slow, slow=(Slow("p3", 1.1),))).action == Continue()  # within what is usual
    assert decide(replace(slow, free={"n3": 1})).action == Continue()  # only its own node has a seat
    crawling = replace(state(Mesh(dp=64)), slow=(Slow("p3", 3.0),))
    assert decide(crawling).action == Shrink(63, (3,))  # better without it


def test_a_stragglers_node_gets_nothing_new():
    left = state(Mesh(dp=3), bounds=(1, 4), free={"n3": 1}, history=(Fault(500.0, "n3", "slow", ("p3",)),))
    assert decide(left).action == Continue()
    assert decide(replace(left, now_s=500.0 + RULES.flaky_window_s + 1)).action == Grow(4)


def test_whoever_computes_wrong_numbers_leaves_if_the_seat_can_be_filled_elsewhere_or_done_without():
    wrong = state(Mesh(dp=4), faulty=("p3",), spares=(Spare("s", "n9"),))
    assert decide(wrong).action == Replace(("p3",), "spare")
    assert "p3 were wrong" in decide(wrong).reason
    assert decide(replace(wrong, spares=(), free={"n9": 1})).action == Replace(("p3",), "cold")
    alone = replace(wrong, spares=(), free={"n3": 1})  # only its own node has a seat
    assert decide(alone).action == Shrink(3, (3,))
    assert decide(replace(alone, bounds=(4, 4))).action == Continue()
    assert decide(replace(wrong, at_boundary=False)).action == Continue()


def test_replicas_that_disagree_go_back_to_the_checkpoint_and_so_does_what_is_lost_with_them():
    assert decide(state(Mesh(dp=2), disagree=True)).action == Rewind(Continue())
    assert decide(state(Mesh(dp=4), disagree=True, lost=lost(1))).action == Rewind(Replace(("p1",), "cold"))


def test_growing_keeps_its_distance_from_faults_and_changes():
    one = state(Mesh(dp=2), bounds=(1, 4), free={"n9": 2})
    assert decide(one).action == Grow(4)
    assert decide(replace(one, history=(Fault(995.0, "n1", "died"),))).action == Continue()
    assert decide(replace(one, resized_s=995.0)).action == Continue()
    assert decide(replace(one, left_s=1.0)).action == Continue()  # soon done
    often = tuple(Fault(984.0 + 4 * i, f"n{i % 2}", "died") for i in range(4))  # every 4 s: it would never grow
    assert decide(replace(one, history=often, now_s=998.5)).action == Grow(4)


def test_growing_keeps_the_spares_that_are_to_be_kept():
    one = state(Mesh(dp=2), bounds=(1, 4), spares=(Spare("a", "n8"), Spare("b", "n9")), rules=Rules(spares=1))
    assert decide(one).action == Grow(3)
    assert decide(replace(one, rules=Rules(spares=2))).action == Continue()


def test_spares_are_started_once_the_mesh_is_complete():
    one = state(Mesh(dp=4), free={"n9": 3}, rules=Rules(spares=2))
    assert spares_to_start(one) == 2
    assert spares_to_start(replace(one, spares=(Spare("s", "n9"),))) == 1
    assert spares_to_start(replace(one, bounds=(1, 8))) == 0
    assert spares_to_start(replace(one, free={})) == 0


def test_the_user_is_obeyed_within_the_bounds():
    shapes = (Unit(tp=2), Unit())
    one = state(Mesh(dp=4, tp=2), per_node=2, bounds=(2, 12), shapes=shapes, free={"n9": 4})
    assert decide(replace(one, requested=Request(num_workers=4, at_s=999.0))).action == Shrink(2, (2, 3))
    assert decide(replace(one, requested=Request(num_workers=10, at_s=999.0), resized_s=998.0)).action == Grow(5)
    assert decide(replace(one, requested=Request(tp=1, at_s=999.0))).action == Reshape(Mesh(dp=12))
    stands = replace(one, requested=Request(num_workers=8, at_s=100.0), resized_s=200.0)
    assert decide(stands).action == Continue()  # though there is room for more
    assert wanted(stands) == one.mesh


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(num_workers=14), "outside the run's bounds 2 to 12"),
        (Request(num_workers=5), "use a multiple of 2"),
        (Request(num_workers=12), "5 sequences of a global batch"),
        (Request(tp=8), "it may be tp 2 x pp 1, tp 1 x pp 1"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_a_reason(request_: Request, says: str):
    shapes = (Unit(tp=2), Unit())
    one = state(Mesh(dp=2, tp=2), per_node=2, bounds=(2, 12), shapes=shapes, most_dp=5)
    assert says in refusal(one, request_)
    assert decide(replace(one, requested=request_)).action == Continue()  # as if it had not been made


def test_experts_must_divide_what_is_left():
    one = state(Mesh(dp=4, ep=2), bounds=(1, 4), lost=lost(3, how="node"))
    assert decide(one).mesh == Mesh(dp=2, ep=2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"spare_s": -1.0}, "spare_s"),
        ({"poll_s": 0.0}, "busy loop"),
        ({"slow_score": 1.0}, "slow_score"),
        ({"flaky_faults": 0}, "flaky_faults"),
    ],
)
def test_rules_that_make_no_sense_are_refused(wrong: dict, says: str):
    with pytest.raises(ValueError, match=says):
        Rules(**wrong)


def test_a_state_that_does_not_fit_its_mesh_is_refused():
    with pytest.raises(ValueError, match="2 ranks needs a place and a node for each"):
        replace(state(Mesh(dp=2)), places=("p0",))
    with pytest.raises(ValueError, match="bounds"):
        replace(state(Mesh(dp=2)), bounds=(3, 2))


def test_what_decides_imports_nothing_but_itself_and_the_standard_library():
    """So no process, clock or tensor can come between a recorded state and its decision."""
    actors = ("policy", "policy_state", "policy_plans", "policy_costs", "capacity", "simulation", "account")
    pure = {*(f"raytron.actors.{name}" for name in actors), "raytron.parallel.mesh"}
    for module in pure:
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
        outside = {name for name, _ in imported(tree, module.rpartition(".")[0])} - pure
        assert {name.split(".")[0] for name in outside} <= sys.stdlib_module_names, (module, outside)


# ------------------------------------------------------------------------------------------------------ measured costs


EVENT = st.one_of(
    st.builds(lambda s: {"event": "newcomers", "places": [], "start_s": s}, st.floats(0, 1000)),
    st.builds(
        lambda event, action, move, rest: {"event": event, "action": action, "move_s": move, "adopt_s": rest},
        st.sampled_from(["recovered", "resized", "rewound"]),
        st.sampled_from(["replace", "shrink", "grow"]),
        st.floats(0, 1000),
        st.floats(0, 10),
    ),
    st.just({"event": "newcomers", "places": []}),  # of an older journal
)


@given(st.lists(EVENT, max_size=30))
def test_measured_costs_replace_guesses_and_only_those(events):
    found, guesses = measured(RULES, events), Rules()
    known = {event["event"]: event for event in events}
    assert replace(found, spare_s=guesses.spare_s, move_s=guesses.move_s, cold_s=guesses.cold_s) == guesses
    took = [e["move_s"] + e["adopt_s"] for e in events if e["event"] == "recovered" and e["action"] == "replace"]
    assert found.spare_s == guesses.spare_s if not took else min(took[-5:]) <= found.spare_s <= max(took[-5:])
    starts = [event["start_s"] for event in events if "start_s" in event]
    low, high = (min(starts[-5:]), max(starts[-5:])) if starts else (guesses.cold_s - found.spare_s,) * 2
    assert low - 1e-9 <= found.cold_s - found.spare_s <= high + 1e-9
    if not known.keys() & {"recovered", "resized"}:
        assert found.move_s == guesses.move_s


def test_one_slow_start_changes_nothing_and_several_do():
    quick, slow = {"event": "newcomers", "start_s": 2.0}, {"event": "newcomers", "start_s": 300.0}
    assert measured(RULES, [quick] * 4 + [slow]).cold_s == 2.0 + RULES.spare_s
    assert measured(RULES, [quick] * 9 + [slow] * 3).cold_s == 300.0 + RULES.spare_s


def test_decisions_follow_what_is_measured():
    """Four ranks wait for a cold start of seconds, and go on with three where it takes minutes."""
    one = state(Mesh(dp=4), lost=lost(1))
    assert isinstance(decide(one).action, Replace)
    taught = measured(RULES, [{"event": "newcomers", "start_s": 300.0}] * 3)
    assert isinstance(decide(replace(one, rules=taught)).action, Shrink)
