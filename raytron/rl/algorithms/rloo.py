"""RLOO: REINFORCE with the mean reward of the *other* trajectories of the prompt as baseline (Ahmadian et al. 2024).

    A_i = R_i - mean of the others        l = -min(r A, clip(r, 0.8, 1.2) A)        mean over all tokens, no KL

The baseline is independent of the trajectory, so with r = 1 the gradient is unbiased, up to the batch's token count.
"""

from __future__ import annotations

import numpy as np

from raytron.rl.advantages import leave_one_out_advantages
from raytron.rl.algorithms.base import Algorithm

__all__ = ["RLOO"]


class RLOO(Algorithm):
    """REINFORCE leave-one-out."""

    def advantages(self, rewards_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
        """Of each trajectory, float64 [N]."""
        return leave_one_out_advantages(rewards_N, groups_N)
