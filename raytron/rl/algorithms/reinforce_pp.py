"""REINFORCE++: no groups; a token is worth the return from it on, compared with all tokens of the batch (Hu 2025).

    A_t = whitened sum_{s >= t} gamma^(s - t) r_s        l = -min(r A, clip(r, 0.8, 1.2) A)        mean over all tokens
    r_s = R at the last chosen token, less what s is charged for KL       gamma 1; no KL, the paper: "reward", 0.01

normalize_std=False leaves the returns as they are.
"""

from __future__ import annotations

import numpy as np

from raytron.rl.advantages import returns_to_go, token_rewards, whiten
from raytron.rl.algorithms.base import Algorithm
from raytron.rl.config import AlgorithmConfig
from raytron.rl.types import Batch

__all__ = ["ReinforcePP"]


class ReinforcePP(Algorithm):
    """REINFORCE++."""

    defaults = AlgorithmConfig(gamma=1.0, normalize_std=True, kl_coefficient=0.01)

    def fields(self, batch: Batch, rewards_N: np.ndarray, charge_T: np.ndarray) -> dict[str, np.ndarray]:
        """The advantages, [T]."""
        returns_T = returns_to_go(token_rewards(rewards_N, charge_T, batch), batch, self.config.gamma)
        return {"advantages": whiten(returns_T, batch.chosen) if self.config.normalize_std else returns_T}
