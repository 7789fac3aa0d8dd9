"""What a step's rollouts were like, as numbers to log: pure functions of groups and batch.

pass@k and best@k are unbiased: means over every choice of k out of a group's n trajectories (Chen et al. 2021), not of
the first k, nor 1 - (1 - p)^k of an estimated p.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from raytron.rl.advantages import varies
from raytron.rl.types import Batch, Group

__all__ = ["best_of", "effective_share", "pass_at", "statistics", "success_statistics"]


def pass_at(k: int, n: int, correct: int) -> float:
    """The probability that of `n` trajectories, `correct` of them right, k chosen at random contain a right one."""
    _check_draw(k, n)
    return 1.0 - comb(n - correct, k) / comb(n, k)


def best_of(k: int, rewards_n: np.ndarray) -> float:
    """The expected highest reward of k trajectories chosen at random."""
    n = len(rewards_n)
    _check_draw(k, n)
    # The i-th smallest (from 0) is the highest of a choice when the other k - 1 come from the i below it.
    shares_n = np.array([comb(i, k - 1) / comb(n, k) for i in range(n)])
    return float(np.sort(rewards_n) @ shares_n)


def success_statistics(groups: Sequence[Group], success: float = 1.0) -> dict[str, float]:
    """pass@k (a reward of at least `success` is right) and best@k, for k = 1, 2, 4, ... as far as every group goes.

    Groups without a valid trajectory are passed over; the excluded ones of others too, so these are of those judged.
    """
    judged = [group.rewards for group in groups if group.valid]
    smallest = min(map(len, judged), default=0)
    result: dict[str, float] = {}
    for k in (2**i for i in range(smallest.bit_length())):
        passed = [pass_at(k, len(rewards_n), int((rewards_n >= success).sum())) for rewards_n in judged]
        result[f"pass@{k}"] = float(np.mean(passed))
        result[f"best@{k}"] = float(np.mean([best_of(k, rewards_n) for rewards_n in judged]))
    return result


def effective_share(rho_mean: float, rho_squared_mean: float) -> float:
    """Effective sample size of importance weights as a share of the samples: (mean rho)^2 / mean rho^2 (Kong 1992)."""
    return rho_mean**2 / rho_squared_mean if rho_squared_mean > 0 else 0.0


def statistics(
    groups: Sequence[Group], batch: Batch, version: int, passed_over: Sequence[Group] = ()
) -> dict[str, float]:
    """Of one step's groups and the batch made of them; `version` is that of the weights about to be trained.

    reward_mean is of what is trained on, reward_sampled_mean of the groups `passed_over` too (`Buffer.passed_over`):
    how good the policy is where solved prompts are left out (dynamic sampling).

    Lengths count chosen tokens. excluded: trajectories that failed or could not be judged. staleness: `version` less
    that of a trajectory's oldest token. explained_variance: the critic's, where the batch has "values" and "returns".
    """
    lengths_N, staleness_N = batch.response_lengths, version - _oldest(batch)
    return {
        "reward_mean": float(batch.rewards.mean()),
        "reward_sampled_mean": float(np.concatenate([group.rewards for group in (*groups, *passed_over)]).mean()),
        "reward_std": float(batch.rewards.std()),
        "reward_min": float(batch.rewards.min()),
        "reward_max": float(batch.rewards.max()),
        "response_length_mean": float(lengths_N.mean()),
        "response_length_max": float(lengths_N.max()),
        "truncated_share": float(batch.truncated.mean()),
        "zero_variance_share": float(np.mean([not varies(group.rewards) for group in groups])),
        "excluded": float(sum(len(group.trajectories) - len(group.valid) for group in groups)),
        "staleness_mean": float(staleness_N.mean()),
        "staleness_max": float(staleness_N.max()),
        **success_statistics(groups),
        **_critic_statistics(batch),
    }


def _check_draw(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"cannot choose {k} of {n} trajectories; k must lie between 1 and their number")


def _oldest(batch: Batch) -> np.ndarray:
    """The oldest version among each trajectory's chosen tokens, int64 [N]."""
    versions_T = np.where(batch.chosen, batch.versions.astype(np.int64), np.iinfo(np.int64).max)
    return np.minimum.reduceat(versions_T, batch.starts[:-1])


def _critic_statistics(batch: Batch) -> dict[str, float]:
    if not {"values", "returns"} <= batch.fields.keys():
        return {}
    values, returns = (batch.fields[name][batch.chosen].astype(np.float64) for name in ("values", "returns"))
    spread = returns.var()
    return {"explained_variance": float(1 - (returns - values).var() / spread) if spread > 0 else 0.0}
