"""What a training step minimises. A loss is a *sum* over tokens, so any split of a batch adds up to the same."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from raytron.data.loader import MicroBatch
from raytron.parallel.collectives import Axis
from raytron.parallel.tensor import vocab_parallel_cross_entropy

__all__ = ["NextToken", "Objective", "next_token_loss"]


class Objective(Protocol):
    """What `TrainEngine` minimises.

    Attributes:
        sums: names of the further sums it reports.
        normalized: whether the micro-batch's own weights make the sum a mean already; else the step divides by the
            global batch's tokens (those with a loss mask). A normalised objective takes any number of micro-batches.
    """

    sums: tuple[str, ...]
    normalized: bool

    def __call__(self, logits_TVt: Tensor, batch: MicroBatch, start: int, tp: Axis) -> tuple[Tensor, Tensor | None]:
        """The loss summed over the micro-batch (scalar, with gradient), and the sums named above ([K], detached).

        logits_TVt: rows of the B x S tokens, columns `start`.. of the vocabulary. Called on every tp rank alike.
        """


def next_token_loss(logits_TVt: Tensor, labels_T: Tensor, mask_T: Tensor, start: int, tp: Axis) -> Tensor:
    """Sum of the masked negative log-likelihoods in nats, fp32 (fp64 stays). `start`: id of the first local column."""
    nll_T = vocab_parallel_cross_entropy(logits_TVt, labels_T, start, tp)
    return (nll_T * mask_T.to(nll_T.dtype)).sum()


class NextToken:
    """Next-token prediction: nats per token that has a loss mask. See `Objective`."""

    sums: tuple[str, ...] = ()
    normalized = False

    def __init__(self, compile: bool = False) -> None:
        self._loss = torch.compile(next_token_loss, dynamic=False) if compile else next_token_loss

    def __call__(self, logits_TVt: Tensor, batch: MicroBatch, start: int, tp: Axis) -> tuple[Tensor, None]:
        """See `Objective`."""
        labels_T, mask_T = batch.labels_BS.reshape(-1), batch.loss_mask_BS.reshape(-1)
        return self._loss(logits_TVt, labels_T, mask_T, start, tp), None
