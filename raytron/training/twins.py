"""Twins, looked at: every shard and its mirror (shards.py) hold the same bits, or something is wrong with a machine."""

from __future__ import annotations

import torch

from raytron.models.base import ALIGN
from raytron.parallel.checksum import checksum
from raytron.parallel.data import twin_position
from raytron.training.engine import TrainEngine

__all__ = ["shard_checksums", "twins_that_differ"]


def shard_checksums(engine: TrainEngine) -> dict[str, tuple[int, int]]:
    """Buffer -> checksums of this rank's own shard of it and of the one that it mirrors (0 without twins). Local."""
    weights = torch.cat([engine.weights[a:b] for a, b in engine.intervals])
    rows = {name: flat.view(-1, ALIGN) for name, flat in {"weights": weights, **engine.optimizer}.items()}
    own = engine.owned // ALIGN
    return {name: (checksum(flat[:own]), checksum(flat[own:])) for name, flat in rows.items()}


def twins_that_differ(engine: TrainEngine) -> list[str]:
    """Buffers of which some shard differs from its mirror. Collective over dp; between steps."""
    if not engine.twins:
        return []
    axis, sums = engine.world.axis("dp"), shard_checksums(engine)
    words = torch.tensor([[n - (n >> 63 << 64) for pair in sums.values() for n in pair]])  # as int64
    rows = axis.all_gather(words).view(axis.size, -1, 2).tolist()
    pairs = [(rows[i], rows[twin_position(i, axis.size)]) for i in range(axis.size)]
    return [name for k, name in enumerate(sums) if any(own[k][0] != held[k][1] for own, held in pairs)]
