"""The KL divergence of two policies, estimated from what both make of a sampled token (Schulman 2020).

With x sampled from pi, a = log pi(x), b = log ref(x):

    k1 = a - b                      k2 = (a - b)^2 / 2                      k3 = exp(b - a) - (b - a) - 1

As *numbers* all estimate KL(pi || ref); k1 and k3 without bias, k3 with less variance and never below 0. As *losses*
they differ, since the gradient of an estimate is not an estimate of the gradient: with x from pi the gradient of k1
has mean 0, that of k2 is the gradient of KL(pi || ref), that of k3 the gradient of the other divergence KL(ref || pi).
k3 times pi / sg[pi] has the right one again. So k1 belongs into the reward, k2 or the corrected k3 into the loss;
both are weighed by pi / behaviour here, which is 1 when x was sampled from pi itself and corrects for it when not.
So weighed they have one gradient, token by token, r (a - b) grad a; they differ as numbers.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

from raytron.rl.surrogate import MOST, bounded_exp

__all__ = ["k1", "k2", "k3", "kl_loss"]

Array = TypeVar("Array", np.ndarray, Tensor)


def k1(logprobs_T: Array, reference_T: Array) -> Array:
    """log pi - log ref, nats."""
    return logprobs_T - reference_T


def k2(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Half its square."""
    return 0.5 * k1(logprobs_T, reference_T).square()


def k3(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """ref / pi - log(ref / pi) - 1, the log-ratio held to 20 nats."""
    difference_T = k1(reference_T, logprobs_T).clamp(-MOST, MOST)
    return difference_T.expm1() - difference_T


def kl_loss(estimator: str, logprobs_T: Tensor, reference_T: Tensor, behaviour_T: Tensor) -> Tensor:
    """Per token, with tokens sampled from `behaviour`: its mean has the gradient of KL(pi || ref) for "k2" and "k3"."""
    ratio_T = bounded_exp(logprobs_T - behaviour_T)
    if estimator == "k2":
        return ratio_T.detach() * k2(logprobs_T, reference_T)
    assert estimator == "k3", estimator
    return ratio_T * k3(logprobs_T, reference_T)
