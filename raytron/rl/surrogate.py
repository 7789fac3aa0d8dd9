"""Ratios of two policies' probabilities, and the clipped objective made of them.

Legend: T tokens of a micro-batch. A = advantage, r = pi / pi_anchor. Every loss is per token and to be minimised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raytron.rl.types import Tokens

__all__ = ["bounded_exp", "clipped_surrogate", "sequence_mean", "sequence_sum"]

MOST = 20.0  # nats: exp(20) is 5e8, still far from overflow when squared in fp32


def bounded_exp(log_ratio_T: Tensor) -> Tensor:
    """exp, of at most 20 nats either way: a token that one policy all but forbids must not become inf, or inf x 0."""
    return log_ratio_T.clamp(-MOST, MOST).exp()


def clipped_surrogate(
    ratio_T: Tensor, advantages_T: Tensor, low: float, high: float, dual: float = 0.0
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) (Schulman et al. 2017; low < high is DAPO's clip-higher).

    dual: where A < 0 the objective is at least dual x A, so a token that became far likelier than it was when sampled
    cannot dominate the step (Ye et al. 2020); 0 for none. Returns the loss, and where a bound holds: bool, no gradient
    passes there.
    """
    plain_T, bounded_T = ratio_T * advantages_T, ratio_T.clamp(1 - low, 1 + high) * advantages_T
    clipped_T = bounded_T < plain_T
    objective_T = torch.where(clipped_T, bounded_T, plain_T)
    if dual:
        floor_T = dual * advantages_T
        floored_T = (advantages_T < 0) & (objective_T < floor_T)
        objective_T, clipped_T = torch.where(floored_T, floor_T, objective_T), clipped_T | floored_T
    return -objective_T, clipped_T


def sequence_sum(x_T: Tensor, tokens: Tokens) -> Tensor:
    """Each token's sequence's sum of x over its chosen tokens, [T]."""
    chosen_T = x_T * tokens.mask
    return chosen_T.new_zeros(tokens.sequences).index_add(0, tokens.sequence, chosen_T)[tokens.sequence]


def sequence_mean(x_T: Tensor, tokens: Tokens) -> Tensor:
    """Each token's sequence's mean of x over its chosen tokens, [T]; 0 where it has none."""
    return sequence_sum(x_T, tokens) / sequence_sum(torch.ones_like(x_T), tokens).clamp(min=1)
