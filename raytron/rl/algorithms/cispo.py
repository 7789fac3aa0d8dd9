"""CISPO: the ratio is a bounded weight without gradient, so clipped tokens go on teaching (MiniMax 2025, M1).

    l = -sg[min(r, 5)] A log pi        mean over tokens        A_i as in GRPO, no KL

The lower bound is off (clip_low 1) as in the paper; the upper, which the paper does not tell, is that of Khatri et al.
2025. clip_high is as everywhere what is added to 1: 4.
"""

from __future__ import annotations

from torch import Tensor

from raytron.rl.algorithms.grpo import GRPO
from raytron.rl.config import AlgorithmConfig
from raytron.rl.types import Tokens

__all__ = ["CISPO"]


class CISPO(GRPO):
    """Clipped importance-sampling weights policy optimization."""

    defaults = AlgorithmConfig(clip_low=1.0, clip_high=4.0, reduction="token", normalize_std=True)
    unused = ("dual_clip",)

    def surrogate(self, ratio_T: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """A weighted log-likelihood; a bound holds where the weight is not the ratio itself."""
        ratio_T = ratio_T.detach()
        weight_T = ratio_T.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        return -weight_T * tokens.advantages * tokens.logprobs, weight_T != ratio_T
