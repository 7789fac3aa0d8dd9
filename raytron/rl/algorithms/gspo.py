"""GSPO: ratios, and so clipping, of whole sequences (Zheng et al. 2025).

    s_i = exp(mean_t log r_it)        s_it = sg[s_i] pi_it / sg[pi_it]
    l = -min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A)

s_it has the value of s_i, and summed over a sequence's tokens / L_i its gradient: the reduction is "sequence" and no
other. A_i as in GRPO; no KL. The bounds are the paper's. They are so narrow that the rounding between engine and
trainer would fill them, so the ratio is against the trainer's own log-probabilities (decoupled): what is stale or
rounded otherwise in the engine is for a `correction`.
"""

from __future__ import annotations

from torch import Tensor

from raytron.rl.algorithms.grpo import GRPO
from raytron.rl.config import AlgorithmConfig
from raytron.rl.surrogate import bounded_exp, sequence_mean
from raytron.rl.types import Tokens

__all__ = ["GSPO"]


class GSPO(GRPO):
    """Group sequence policy optimization."""

    defaults = AlgorithmConfig(
        clip_low=0.0003, clip_high=0.0004, decoupled=True, reduction="sequence", normalize_std=True
    )

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        if self.config.reduction != "sequence":
            raise ValueError(f"algorithm {config.name}: its reduction is sequence, not {self.config.reduction}")

    def ratio(self, log_ratio_T: Tensor, tokens: Tokens) -> Tensor:
        """The sequence's, with the token's gradient."""
        mean_T = sequence_mean(log_ratio_T.detach(), tokens)
        return bounded_exp(mean_T + (log_ratio_T - log_ratio_T.detach()))
