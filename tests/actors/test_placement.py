"""Placement decisions as properties of pure functions, and what a real cluster answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from raytron.actors import ActorGroup, CapacityError, Session
from raytron.actors.placement import Node, assign, choose, newcomers, place, ranks_that_fit, room, shortage, without
from raytron.parallel import Mesh

CPU = {"CPU": 1.0}
MESHES = st.builds(
    Mesh, dp=st.integers(1, 4), pp=st.integers(1, 3), cp=st.integers(1, 2), tp=st.sampled_from([1, 2, 4])
)
SIZES = st.lists(st.integers(0, 16), min_size=1, max_size=6)


def nodes(sizes: list[int], free: list[int] | None = None) -> tuple[Node, ...]:
    pairs = zip(sizes, free or sizes, strict=True)
    return tuple(Node(f"id{i}", f"10.0.0.{200 - i}", {"CPU": t}, {"CPU": f}) for i, (t, f) in enumerate(pairs))


def fill(requests, sizes: list[int]) -> list[dict[int, str]] | None:
    """Grant requests the way Ray does (first fit here): the node of every bundle, None if one cannot be granted."""
    left, granted = list(sizes), []
    for request in requests:
        where: dict[int, str] = {}
        whole = sum(b["CPU"] for b in request.bundles)
        for i, bundle in enumerate(request.bundles):
            need = whole if request.strategy == "STRICT_PACK" and i == 0 else bundle["CPU"]
            if request.strategy == "STRICT_PACK" and i > 0:
                where[i] = where[0]
                continue
            at = next((n for n, size in enumerate(left) if size >= need), None)
            if at is None:
                return None
            left[at] -= need
            where[i] = f"id{at}"
        granted.append(where)
    return granted


@given(st.integers(1, 8), MESHES, SIZES)
def test_newcomers_are_asked_for_in_a_way_that_is_granted_wherever_single_ranks_are(count, unit, sizes):
    mesh = newcomers(count, replace(unit, dp=1), CPU, nodes(sizes))
    assert mesh.size == count
    if count <= sum(sizes):
        assert fill(choose(mesh, CPU, nodes(sizes)), sizes) is not None


def test_newcomers_complete_groups_that_are_there():
    """A seat free on each of two nodes of two: no pair finds room, and two ranks do."""
    unit, free = Mesh(tp=2), nodes([2, 2], [1, 1])
    assert newcomers(2, unit, CPU, free) == Mesh(dp=2)
    assert newcomers(2, unit, CPU, nodes([2, 2], [2, 1])) == unit
    assert newcomers(2, unit, CPU, nodes([2, 2], [0, 0])) == unit, "an autoscaler may answer it"


@given(MESHES, SIZES)
def test_what_fits_is_asked_for_in_a_way_that_is_granted(mesh: Mesh, sizes: list[int]):
    requests = choose(mesh, CPU, nodes(sizes))
    assert len(requests) == mesh.dp
    assert all(sum(b["CPU"] for b in r.bundles) == mesh.unit for r in requests)
    if sum(size // mesh.tp for size in sizes) * mesh.tp >= mesh.size:
        assert fill(requests, sizes) is not None


@given(MESHES, SIZES)
def test_tp_groups_stay_on_a_node_when_any_node_can_hold_one(mesh: Mesh, sizes: list[int]):
    requests = choose(mesh, CPU, nodes(sizes))
    if max(sizes) >= mesh.tp:
        assert all(r.ranks_per_bundle == mesh.tp for r in requests)
    elif sum(sizes) >= mesh.size:
        assert all(r.ranks_per_bundle == 1 for r in requests)


def test_units_that_fit_a_node_are_bound_to_one():
    strict = [r.strategy for r in choose(Mesh(dp=3, pp=2, tp=2), CPU, nodes([4, 6, 6]))]
    assert strict == ["STRICT_PACK"] * 3
    mixed = [r.strategy for r in choose(Mesh(dp=3, pp=2, tp=2), CPU, nodes([4, 6, 2]))]
    assert mixed == ["STRICT_PACK", "STRICT_PACK", "PACK"]


def test_busy_nodes_are_judged_by_what_they_hold_when_idle():
    (request,) = choose(Mesh(tp=4), CPU, nodes([4, 2], free=[1, 2]))
    assert (request.strategy, request.ranks_per_bundle) == ("STRICT_PACK", 4)


def test_a_chosen_strategy_is_used_for_every_unit():
    assert {r.strategy for r in choose(Mesh(dp=2, pp=2), CPU, nodes([8]), "STRICT_SPREAD")} == {"STRICT_SPREAD"}


@given(MESHES, SIZES)
def test_seats(mesh: Mesh, sizes: list[int]):
    """Every bundle is filled, TP groups share a node, and ranks follow the nodes' addresses within a unit."""
    cluster = nodes(sizes)
    requests = choose(mesh, CPU, cluster)
    granted = fill(requests, sizes)
    if granted is None:
        return
    seats = assign(requests, granted, cluster)
    assert [s.rank for s in seats] == list(range(mesh.size))
    filled = [(s.group, s.bundle) for s in seats]
    assert all(filled.count(key) == requests[key[0]].ranks_per_bundle for key in filled)
    order = {node.id: at for at, node in enumerate(reversed(cluster))}  # addresses count downwards
    for unit in range(mesh.dp):
        mine = seats[unit * mesh.unit : (unit + 1) * mesh.unit]
        assert len({s.group for s in mine}) == 1
        assert [order[s.node] for s in mine] == sorted(order[s.node] for s in mine)
    if requests[0].ranks_per_bundle == mesh.tp:
        for ranks in mesh.groups("tp"):
            assert len({seats[r].node for r in ranks}) == 1


def test_addresses_sort_as_numbers():
    cluster = (Node("b", "10.0.0.10", CPU, CPU), Node("a", "10.0.0.9", CPU, CPU), Node("c", "host", CPU, CPU))
    requests = choose(Mesh(pp=3), CPU, cluster)
    seats = assign(requests, [{0: "c", 1: "b", 2: "a"}], cluster)
    assert [s.node for s in seats] == ["a", "b", "c"]


def test_room_counts_the_scarcest_resource():
    assert room({"CPU": 7.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 0.5}) == 3
    assert room({"CPU": 0.3}, {"CPU": 0.1}) == 3
    assert room({"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}) == 0


def test_shortage_says_what_was_asked_and_what_is_there():
    each = {"CPU": 1.0, "GPU": 1.0}
    node = Node("0123456789", "10.0.0.1", {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0})
    text = shortage(Mesh(dp=2, pp=2, tp=2), each, [node], 30.0)
    assert "8 ranks of CPU 1, GPU 1 each" in text
    assert "dp 2 x pp 2 x cp 1 x tp 2" in text
    assert "room for 1 now, for 4 when idle, after waiting 30 s" in text
    assert "node 10.0.0.1 (01234567): CPU 8 free of 8, GPU 1 free of 4; room for 1 ranks" in text
    assert "num_workers" in text


def test_seats_that_are_free_are_granted_however_little_is_waited(cluster: Session):
    place(Mesh(dp=2), CPU, wait_s=0.0).remove()


def test_the_cluster_refuses_more_than_it_holds_and_keeps_nothing(cluster: Session):
    with pytest.raises(CapacityError, match=r"cannot hold 64 ranks of CPU 1 each .*room for \d+ now, for 8 when idle"):
        ActorGroup(Mesh(dp=32, tp=2), wait_s=0.5)
    with pytest.raises(CapacityError, match=r"GPU 0 free of 0"):
        ActorGroup(Mesh(), {"CPU": 1, "GPU": 1}, wait_s=0.5)
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"CREATED", "REMOVED"}


def test_a_unit_is_one_placement_group_with_a_bundle_per_tp_group(cluster: Session):
    placement = place(Mesh(dp=2, tp=2), {"CPU": 0.5}, wait_s=30)
    try:
        assert [(s.group, s.bundle) for s in placement.seats] == [(0, 0), (0, 0), (1, 0), (1, 0)]
        assert placement.groups[0].bundle_specs == [{"CPU": 1.0}]
    finally:
        placement.remove()


def node(name: str, cpus: float, free: float, **more: float) -> Node:
    return Node(name, name, {"CPU": cpus, **more}, {"CPU": free, **more})


def test_ranks_that_fit_share_a_node_with_their_tp_group():
    nodes = [node("a", 8, 7), node("b", 8, 3)]
    assert ranks_that_fit(nodes, {"CPU": 1}) == 10
    assert ranks_that_fit(nodes, {"CPU": 2}) == 4
    assert ranks_that_fit(nodes, {"CPU": 1}, tp=4) == 4
    assert ranks_that_fit(nodes, {"CPU": 1}, tp=16) == 10  # no node could ever hold such a group
    assert ranks_that_fit([], {"CPU": 1}) == 0


def test_what_others_take_is_not_free():
    nodes = (node("a", 8, 4, GPU=1.0), node("b", 8, 8, GPU=2.0))
    left = without(nodes, [{"CPU": 1.0}, {"CPU": 6.0, "GPU": 2.0}, {"CPU": 100.0}])
    assert [dict(one.available) for one in left] == [{"CPU": 3, "GPU": 1}, {"CPU": 2, "GPU": 0}]
    assert nodes[0].available == {"CPU": 4, "GPU": 1.0}
    assert without(nodes, []) == nodes
