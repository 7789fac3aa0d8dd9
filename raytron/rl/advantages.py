"""What a trajectory or a token was worth compared with what was to be expected. numpy, float64.

Legend: N trajectories; T tokens of all of them, one behind the other; L the most tokens chosen in one trajectory.
A group is the trajectories with one id in `groups_N`, in whatever order and number they come: failed ones are missing.
"""

from __future__ import annotations

import numpy as np

from raytron.rl.types import Batch

__all__ = [
    "TOLERANCE",
    "gae",
    "group_advantages",
    "group_statistics",
    "leave_one_out_advantages",
    "overlong_charge",
    "returns_to_go",
    "token_rewards",
    "varies",
    "whiten",
]

TOLERANCE = 1e-6
"""A deviation below this is rounding of equal rewards; dividing by it would make noise into advantages."""


def varies(rewards_N: np.ndarray) -> bool:
    """Whether rewards of one group differ, so that something can be learned from it."""
    return len(rewards_N) > 1 and float(np.std(rewards_N, ddof=1)) > TOLERANCE


def group_statistics(rewards_N: np.ndarray, groups_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each trajectory's group, [N]: its size, its mean reward, and the deviation (n - 1; 0 in a group of one)."""
    _, group_N = np.unique(groups_N, return_inverse=True)
    size_G = np.bincount(group_N)
    mean_N = (np.bincount(group_N, rewards_N) / size_G)[group_N]
    squares_G = np.bincount(group_N, (rewards_N - mean_N) ** 2)
    return size_G[group_N], mean_N, np.sqrt(squares_G / np.maximum(size_G - 1, 1))[group_N]


def group_advantages(rewards_N: np.ndarray, groups_N: np.ndarray, normalize_std: bool) -> np.ndarray:
    """R - mean of the group (Dr.GRPO), divided by its deviation if `normalize_std` (GRPO); [N].

    0 in a group of one, whose raw reward is no advantage, and where the group's rewards are alike.
    """
    _, mean_N, std_N = group_statistics(rewards_N, groups_N)
    scale_N = std_N + TOLERANCE if normalize_std else np.ones_like(std_N)
    return np.where(std_N > TOLERANCE, (rewards_N - mean_N) / scale_N, 0.0)


def leave_one_out_advantages(rewards_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """R minus the mean of the others in the group (RLOO), which is n / (n - 1) times R minus the mean of all; [N]."""
    size_N, _, _ = group_statistics(rewards_N, groups_N)
    return group_advantages(rewards_N, groups_N, normalize_std=False) * size_N / np.maximum(size_N - 1, 1)


def whiten(x_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    """To mean 0 and deviation 1 over the tokens of the mask; 0 elsewhere, and everywhere if they do not vary."""
    x, out_T = x_T[mask_T], np.zeros_like(x_T)
    if varies(x):
        out_T[mask_T] = (x - x.mean()) / (x.std(ddof=1) + TOLERANCE)
    return out_T


def overlong_charge(lengths_N: np.ndarray, longest: int, buffer: int, penalty: float) -> np.ndarray:
    """What to add to rewards of responses that come within `buffer` tokens of `longest` (DAPO, eq. 13), [N].

    It falls from 0 to -penalty over the buffer, and never below that, however long a response is.
    """
    over_N = (lengths_N - (longest - buffer)) / buffer
    return -penalty * np.clip(over_N, 0.0, 1.0)


def token_rewards(rewards_N: np.ndarray, charge_T: np.ndarray, batch: Batch) -> np.ndarray:
    """The trajectory's reward at its last chosen token, less what each chosen token is charged; [T]."""
    rewards_T = np.where(batch.chosen, -charge_T, 0.0)
    last_N = np.flatnonzero(batch.chosen)[np.cumsum(batch.response_lengths) - 1]
    rewards_T[last_N] += rewards_N
    return rewards_T


def returns_to_go(rewards_T: np.ndarray, batch: Batch, gamma: float) -> np.ndarray:
    """Of each chosen token the discounted sum of rewards from it on, 0 elsewhere; [T]."""
    return _from_steps(_discounted_sums(_to_steps(rewards_T, batch), gamma), batch)


def gae(rewards_T: np.ndarray, values_T: np.ndarray, batch: Batch, gamma: float, lam: float) -> np.ndarray:
    """Generalized advantage estimates (Schulman et al. 2016) of chosen tokens, 0 elsewhere; [T].

    A step leads from a chosen token to the next one chosen: what an environment says in between is passed over, so
    later rewards reach the turns before it undiminished. After the last there is nothing more to come.
    """
    values_NL = _to_steps(values_T, batch)
    next_NL = np.pad(values_NL[:, 1:], ((0, 0), (0, 1)))
    deltas_NL = _to_steps(rewards_T, batch) + gamma * next_NL - values_NL
    return _from_steps(_discounted_sums(deltas_NL, gamma * lam), batch)


def _discounted_sums(x_NL: np.ndarray, factor: float) -> np.ndarray:
    sums_NL = x_NL.copy()
    for step in range(x_NL.shape[1] - 2, -1, -1):
        sums_NL[:, step] += factor * sums_NL[:, step + 1]
    return sums_NL


def _steps(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every chosen token: its place in T, its trajectory, and the how manieth chosen token of that it is."""
    at, lengths_N = np.flatnonzero(batch.chosen), batch.response_lengths
    rows = np.repeat(np.arange(len(batch)), lengths_N)
    return at, rows, np.arange(len(at)) - (np.cumsum(lengths_N) - lengths_N)[rows]


def _to_steps(x_T: np.ndarray, batch: Batch) -> np.ndarray:
    """The chosen tokens' x as a matrix [N, L], zeros behind each trajectory's last."""
    at, rows, steps = _steps(batch)
    x_NL = np.zeros((len(batch), max(batch.response_lengths.max(), 1)))
    x_NL[rows, steps] = x_T[at]
    return x_NL


def _from_steps(x_NL: np.ndarray, batch: Batch) -> np.ndarray:
    at, rows, steps = _steps(batch)
    x_T = np.zeros(len(batch.tokens))
    x_T[at] = x_NL[rows, steps]
    return x_T
