"""REINFORCE++-baseline: REINFORCE++ of rewards less their group's mean (Hu 2025).

    A_t = whitened (R - mean of the group), over all tokens        no KL; the paper: in the loss, by k2
    clip 0.8 .. 1.2, mean over all tokens

A group of one has no baseline: its advantage is 0, and it takes no part in the whitening.
"""

from __future__ import annotations

import numpy as np

from raytron.rl.advantages import group_advantages, group_statistics, returns_to_go, token_rewards, whiten
from raytron.rl.algorithms.base import Algorithm
from raytron.rl.config import AlgorithmConfig
from raytron.rl.types import Batch

__all__ = ["ReinforcePPBaseline"]


class ReinforcePPBaseline(Algorithm):
    """REINFORCE++ with the group's mean as baseline."""

    defaults = AlgorithmConfig(gamma=1.0, normalize_std=True, kl_coefficient=0.01, kl_estimator="k2")

    def fields(self, batch: Batch, rewards_N: np.ndarray, charge_T: np.ndarray) -> dict[str, np.ndarray]:
        """The advantages, [T]."""
        size_N, _, _ = group_statistics(rewards_N, batch.groups)
        compared_T = batch.chosen & (size_N > 1)[batch.rows]
        centred_N = group_advantages(rewards_N, batch.groups, normalize_std=False)
        rewards_T = np.where(compared_T, token_rewards(centred_N, charge_T, batch), 0.0)
        returns_T = returns_to_go(rewards_T, batch, self.config.gamma)
        return {"advantages": whiten(returns_T, compared_T) if self.config.normalize_std else returns_T}
