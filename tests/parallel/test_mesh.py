"""Rank arithmetic: every view of the ranks is a partition, and the order is tp, cp, pp, dp."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.parallel.mesh import AXES, EXPERT_AXES, Mesh

SIZES = st.integers(1, 4)


@st.composite
def meshes(draw) -> Mesh:
    dp, pp, cp, tp = (draw(SIZES) for _ in range(4))
    stage = dp * cp * tp
    etp = draw(st.sampled_from([n for n in range(1, stage + 1) if stage % n == 0]))
    ep = draw(st.sampled_from([n for n in range(1, stage // etp + 1) if stage // etp % n == 0]))
    return Mesh(dp, pp, cp, tp, ep=ep, etp=etp)


@given(meshes())
def test_coordinates_and_ranks_are_inverse_and_tp_is_fastest(mesh):
    coords = [mesh.coords(rank) for rank in range(mesh.size)]
    assert coords == sorted(coords)
    assert len(set(coords)) == mesh.size == mesh.dp * mesh.unit
    assert [mesh.rank(**c._asdict()) for c in coords] == list(range(mesh.size))


@given(meshes())
def test_a_unit_is_contiguous(mesh):
    for rank in range(mesh.size):
        assert mesh.coords(rank).dp == rank // mesh.unit


@given(meshes(), st.sampled_from((*AXES, *EXPERT_AXES, "world", "dp_cp", "pp_tp")))
def test_groups_of_an_axis_hold_every_rank_once(mesh, axis):
    groups = mesh.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    size = mesh.size if axis == "world" else 1
    for name in axis.split("_") if axis != "world" else ():
        size *= getattr(mesh, name)
    assert {len(group) for group in groups} == {size}
    for group in groups:
        assert {mesh.group(axis, rank) for rank in group} == {group}
        assert list(group) == sorted(group)


@given(meshes(), st.sampled_from(AXES))
def test_a_line_differs_in_its_own_coordinate_only(mesh, axis):
    for group in mesh.groups(axis):
        coords = [mesh.coords(rank)._asdict() for rank in group]
        assert [c.pop(axis) for c in coords] == list(range(len(group)))
        assert all(c == coords[0] for c in coords)


@given(meshes())
def test_the_expert_view_stays_within_a_stage(mesh):
    """edp x ep x etp renumbers the ranks of a stage: two lines of different axes share at most one rank."""
    assert mesh.edp * mesh.ep * mesh.etp == mesh.dp * mesh.cp * mesh.tp
    for rank in range(mesh.size):
        lines = [set(mesh.group(axis, rank)) for axis in EXPERT_AXES]
        assert {mesh.coords(r).pp for line in lines for r in line} == {mesh.coords(rank).pp}
        for i, line in enumerate(lines):
            assert all(line & other == {rank} for other in lines[i + 1 :])


def test_megatrons_example():
    """16 ranks, tp 2, pp 2, written out by hand."""
    mesh = Mesh(dp=4, pp=2, tp=2, ep=2, etp=1)
    assert mesh.group("tp", 5) == (4, 5)
    assert mesh.group("pp", 5) == (5, 7)
    assert mesh.group("dp", 5) == (1, 5, 9, 13)
    assert mesh.group("ep", 5) == (4, 5)
    assert mesh.group("edp", 5) == (1, 5, 9, 13)
    assert mesh.group("dp_cp", 6) == (2, 6, 10, 14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mesh(tp=0), r"mesh axis tp is 0.*at least 1"),
        (lambda: Mesh(dp=-1), r"mesh axis dp is -1"),
        (lambda: Mesh(dp=2, ep=3), r"ep x etp = 3 x 1 does not divide dp x cp x tp = 2 x 1 x 1; choose"),
        (lambda: Mesh(dp=2).coords(2), r"rank 2 is not in a mesh of 2 ranks"),
        (lambda: Mesh().group("xp", 0), r"unknown mesh axis 'xp'; axes are dp, pp, cp, tp, edp"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
