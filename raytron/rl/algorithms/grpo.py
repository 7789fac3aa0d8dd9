"""GRPO: a trajectory's advantage is its reward among those of the same prompt (Shao et al. 2024, DeepSeekMath).

    A_i = (R_i - mean) / (std + 1e-6), std with n - 1       l = -min(r A, clip(r, 0.8, 1.2) A)
    mean over sequences of the mean over tokens             no KL; the paper charges 0.04 k3 in the loss

With kl="reward" set normalize_std=False: in a group of equal rewards only the KL would vary, and dividing by its
deviation would make any coefficient one.
"""

from __future__ import annotations

from raytron.rl.algorithms.base import Algorithm
from raytron.rl.config import AlgorithmConfig

__all__ = ["GRPO"]


class GRPO(Algorithm):
    """Group-relative policy optimization; what DAPO, Dr.GRPO, GSPO and CISPO change."""

    defaults = AlgorithmConfig(reduction="sequence", normalize_std=True)

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        if self.config.kl == "reward" and self.config.normalize_std:
            raise ValueError(
                f"algorithm {config.name}: kl='reward' divided by a group's deviation has no fixed size; "
                "set normalize_std=False or kl='loss'"
            )
