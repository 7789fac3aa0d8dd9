"""Training losses. A loss is a *sum* over tokens; the engine divides by the global batch's token count."""

from __future__ import annotations

from torch import Tensor

from raytron.parallel.collectives import Axis
from raytron.parallel.tensor import vocab_parallel_cross_entropy

__all__ = ["next_token_loss"]


def next_token_loss(logits_TVt: Tensor, labels_T: Tensor, mask_T: Tensor, start: int, tp: Axis) -> Tensor:
    """Sum of the masked negative log-likelihoods in nats, fp32 (fp64 stays). `start`: id of the first local column."""
    nll_T = vocab_parallel_cross_entropy(logits_TVt, labels_T, start, tp)
    return (nll_T * mask_T.to(nll_T.dtype)).sum()
