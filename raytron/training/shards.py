"""How the flat buffer of trained weights is shared out among data-parallel ranks, on this mesh or any other.

With `parallel.twins` every shard has two owners, `dp // 2` positions apart: units are sorted by node, so these are
different nodes where there are two. Both get the reduced gradients and apply the same update, so they agree to the bit
without ever talking of it, and the loss of one loses nothing, not even the step under way. The rejected alternative, a
copy in another node's memory refreshed after each step, is one step old just when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable

from raytron.config import ParallelConfig
from raytron.models.base import ALIGN, ShardedModel, rank_name
from raytron.parallel.data import Interval, buckets, held_intervals
from raytron.parallel.layout import Layout, Place, cut
from raytron.parallel.mesh import Mesh

__all__ = ["gradient_buckets", "optimizer_layout"]


def gradient_buckets(total: int, parallel: ParallelConfig, itemsize: int, mesh: Mesh) -> list[Interval]:
    """The buckets of a gradient buffer of `total` elements of `itemsize` bytes."""
    return buckets(total, int(parallel.bucket_mb * 2**20 / itemsize), ALIGN * mesh.dp)


def optimizer_layout(
    model: ShardedModel,
    parallel: ParallelConfig,
    place: Callable[[int], Place] = rank_name,
    version: int = 0,
    mirrors: bool = True,
) -> Layout:
    """Where the optimizer's tensors (one of them) live on *all* ranks, in each one's flat buffer "shard".

    model: any rank's, a sketch on the meta device too. mirrors: with the shards that ranks hold for their twins, which
    lie behind their own.
    """
    weights, frozen, mesh = model.trained_layout(place, version), model.frozen_ends(place), model.world.mesh
    itemsize = max(4, model.weights.element_size())  # gradients are fp32, or fp64 where weights are
    intervals = {}
    for rank in range(mesh.size):
        where, dp = place(rank), mesh.coords(rank).dp
        start = frozen[where]
        total = weights.sizes[where, "weights"] - start
        shares = [(0, total)]
        if parallel.zero and mesh.dp > 1:
            cuts = gradient_buckets(total, parallel, itemsize, mesh)
            shares = held_intervals(cuts, mesh.dp, dp, mirrors and parallel.twins)
        intervals[where] = [(start + a, start + b) for a, b in shares]
    return cut(weights, intervals, of="weights", buffer="shard")
