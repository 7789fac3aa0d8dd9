"""From a loss per token to the loss of a batch: weights that turn every reduction into a plain weighted sum.

They come from the counts of the whole batch, before anything is split, so any cut into micro-batches, ranks or packings
gives the same gradient; a mean of micro-batches' means would not.

Legend: N trajectories, T tokens of all of them; L_i chosen tokens of trajectory i.
"""

from __future__ import annotations

import numpy as np

from raytron.rl.types import Batch

__all__ = ["reduction_weights"]


def reduction_weights(batch: Batch, reduction: str, constant_length: int | None = None) -> np.ndarray:
    """What each token's loss is multiplied by, float64 [T], 0 where not chosen.

    token: 1 / sum L, the mean over tokens (DAPO). sequence: 1 / (N L_i), the mean over sequences of the mean over their
    tokens (GRPO). constant: 1 / (N x constant_length), which weighs tokens alike in every batch (Dr.GRPO).
    """
    lengths_N = batch.response_lengths
    if reduction == "token":
        each_N = np.full(len(batch), 1 / max(lengths_N.sum(), 1))
    elif reduction == "sequence":
        each_N = 1 / (len(batch) * np.maximum(lengths_N, 1))
    else:
        assert reduction == "constant", reduction
        each_N = np.full(len(batch), 1 / (len(batch) * constant_length))
    return np.where(batch.chosen, each_N[batch.rows], 0.0)
