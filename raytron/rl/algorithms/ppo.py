"""PPO with a critic: a token is worth what came of it beyond what the critic expected (Schulman et al. 2017).

    A_t = GAE(gamma 1, lambda 1), whitened over all tokens        returns A_t + V_t, before whitening
    l = -min(r A, clip(r, 0.8, 1.2) A)        mean over all tokens        no KL, Ouyang et al. 2022: "reward", 0.02
    critic: 1/2 max((V - return)^2, (clip(V, V_old - 0.2, V_old + 0.2) - return)^2)

lambda is 1 since the one reward comes at the end: 0.95 would leave the first of 200 tokens 1/30000 of it.
normalize_std=False leaves the advantages as they are.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from raytron.rl.advantages import gae, token_rewards, whiten
from raytron.rl.algorithms.base import Algorithm
from raytron.rl.config import AlgorithmConfig
from raytron.rl.types import Batch, Tokens

__all__ = ["PPO"]


class PPO(Algorithm):
    """Proximal policy optimization."""

    needs_critic = True
    defaults = AlgorithmConfig(gamma=1.0, lam=1.0, value_clip=0.2, normalize_std=True, kl_coefficient=0.02)

    def fields(self, batch: Batch, rewards_N: np.ndarray, charge_T: np.ndarray) -> dict[str, np.ndarray]:
        """Advantages and returns, [T]; 0 where not chosen."""
        values_T = np.where(batch.chosen, batch.fields["values"].astype(np.float64), 0.0)
        rewards_T = token_rewards(rewards_N, charge_T, batch)
        advantages_T = gae(rewards_T, values_T, batch, self.config.gamma, self.config.lam)
        returns_T = advantages_T + values_T
        if self.config.normalize_std:
            advantages_T = whiten(advantages_T, batch.chosen)
        return {"advantages": advantages_T, "returns": returns_T}

    def value_loss(self, values_T: Tensor, tokens: Tokens) -> Tensor:
        """Of each token, [T], from `extra["returns"]` and, the critic's estimates when the step began,
        `extra["values"]`."""
        returns_T, old_T = tokens.extra["returns"], tokens.extra["values"]
        loss_T = (values_T - returns_T).square()
        if self.config.value_clip:
            near_T = old_T + (values_T - old_T).clamp(-self.config.value_clip, self.config.value_clip)
            loss_T = loss_T.maximum((near_T - returns_T).square())
        return 0.5 * loss_T
