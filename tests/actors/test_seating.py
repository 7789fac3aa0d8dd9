"""Who takes which rank after a change: properties of a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.actors.seating import seating
from raytron.parallel import Mesh

MESHES = st.builds(Mesh, dp=st.integers(1, 4), pp=st.integers(1, 2), tp=st.sampled_from([1, 2, 4]))


@given(MESHES, MESHES, st.data())
def test_every_rank_has_a_place_and_who_can_stay_stays(old: Mesh, new: Mesh, data: st.DataObject):
    places = [f"actor-{i}" for i in range(old.size)]
    fresh = [f"actor-{100 + i}" for i in range(data.draw(st.integers(0, 8)))]
    out = data.draw(st.sets(st.sampled_from(places)))
    nodes = {place: f"n{data.draw(st.integers(0, 2))}" for place in (*places, *fresh)}
    staying = [place for place in places if place not in out]
    args = {"out": out, "fresh": fresh}
    if len(staying) + len(fresh) < new.size:
        with pytest.raises(ValueError, match="more than there are places"):
            seating(old, places, new, nodes, **args)
        return
    seats = seating(old, places, new, nodes, **args)
    assert len(set(seats)) == new.size
    assert set(seats) <= {*staying, *fresh}
    if old.unit == new.unit and (old.pp, old.tp) == (new.pp, new.tp):
        common = min(old.size, new.size)
        assert [s for s, p in zip(seats[:common], places, strict=False) if p in staying and s != p] == []


@given(MESHES, st.data())
def test_replacing_changes_the_lost_ranks_only(mesh: Mesh, data: st.DataObject):
    places = [f"actor-{i}" for i in range(mesh.size)]
    lost = data.draw(st.lists(st.sampled_from(places), unique=True))
    fresh = [f"new-{i}" for i in range(len(lost))]
    nodes = dict.fromkeys((*places, *fresh), "n")
    seats = seating(mesh, places, mesh, nodes, out=lost, fresh=fresh)
    assert [place for place, seat in zip(places, seats, strict=True) if place != seat] == sorted(lost, key=places.index)


def test_units_given_up_fill_the_holes_of_others_at_the_same_position():
    places = [f"a{i}" for i in range(6)]  # dp 3 x pp 2: units (a0 a1) (a2 a3) (a4 a5)
    seats = seating(Mesh(dp=3, pp=2), places, Mesh(dp=2, pp=2), dict.fromkeys(places, "n"), out=["a1"], units=[2])
    assert seats == ("a0", "a5", "a2", "a3")


def test_a_tensor_parallel_group_stays_on_one_node_where_one_has_room():
    places, fresh = ["a", "b"], ["x1", "y1", "y2", "x2"]
    nodes = {"a": "n", "b": "n", "x1": "x", "y1": "y", "y2": "y", "x2": "x"}
    seats = seating(Mesh(tp=2), places, Mesh(dp=2, tp=2), nodes, fresh=fresh)
    assert seats == ("a", "b", "x1", "x2")
    assert seating(Mesh(tp=2), places, Mesh(dp=2, tp=2), nodes, out=["b"], fresh=fresh) == ("a", "x1", "y1", "y2")
