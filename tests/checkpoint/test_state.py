"""The state's layout survives JSON, and names each shard's file."""

from __future__ import annotations

import pytest

from raytron.checkpoint.state import decode_layout, encode_layout, on_disk, shard_files
from raytron.models import build
from raytron.parallel.collectives import World
from raytron.parallel.data import buckets, shard_intervals
from raytron.parallel.layout import cut, owners, plan, volume
from raytron.parallel.mesh import Mesh
from tests.checkpoint.engines import ARCHS


def layout_of(mesh: Mesh, zero: bool):
    weights = build(ARCHS["untied"], World.sketch(mesh, 0), device="meta").layout()
    intervals = {}
    for rank in range(mesh.size):
        total = weights.sizes[f"rank-{rank}", "weights"]
        cuts = buckets(total, 1000, 64 * mesh.dp)
        shards = shard_intervals(cuts, mesh.dp, mesh.coords(rank).dp) if zero else [(0, total)]
        intervals[f"rank-{rank}"] = shards
    return cut(weights, intervals)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=4), Mesh(dp=4, tp=2), Mesh(dp=3, pp=2)])
def test_files_hold_everything_once_and_survive_json(mesh, zero):
    layout = layout_of(mesh, zero)
    files = shard_files(layout)
    stored = on_disk(layout, files)
    assert decode_layout(encode_layout(stored)) == stored
    stored.check()
    assert len(stored.places) == (mesh.size if zero else mesh.unit)
    everything = {name: spec.numel for name, spec in layout.tensors.items()}
    once = owners(stored)
    assert {name: sum(volume(p.box) for p in once.pieces[name]) for name in once.pieces} == everything
    assert plan(stored, layout).bytes_moved > 0
    # Two files that hold the same pieces would be one too many.
    held = [tuple((name, p.box) for name, p in stored.at(place)) for place in stored.places]
    assert not zero or len(set(held)) == len(held)


def test_a_newer_format_is_refused():
    with pytest.raises(ValueError, match="format 2; this raytron reads 1"):
        decode_layout(b'{"format": 2}')
