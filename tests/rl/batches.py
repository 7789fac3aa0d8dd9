"""Small trajectories, batches and micro-batches to compute by hand, and derivatives to hold gradients against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from raytron.rl.types import Batch, Group, Tokens, Trajectory

properties = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
"""Of a property test: what a busy machine may not fail."""


def trajectory(
    marks: str,
    reward: float | None = 0.0,
    logprobs: Sequence[float] | None = None,
    versions: int | Sequence[int] = 0,
    truncated: bool = False,
) -> Trajectory:
    """Of one token per mark: "#" the policy chose, "." it did not. `logprobs` are of the chosen ones."""
    chosen = np.array([mark == "#" for mark in marks])
    flat = np.zeros(len(marks))
    flat[chosen] = -1.0 if logprobs is None else logprobs
    version = np.where(chosen, versions, -1)
    return Trajectory(np.arange(len(marks)), chosen, flat, version, reward, truncated)


def batch_of(*groups: Sequence[Trajectory]) -> Batch:
    return Batch.of([Group(index, tuple(trajectories)) for index, trajectories in enumerate(groups)])


def tokens_of(batch: Batch, logprobs_T: torch.Tensor, **changes) -> Tokens:
    """A prepared batch, whole, as one micro-batch in float64."""
    fields = {name: torch.tensor(values, dtype=torch.float64) for name, values in batch.fields.items()}
    given = {
        "logprobs": logprobs_T,
        "mask": torch.tensor(batch.chosen, dtype=torch.float64),
        "sequence": torch.tensor(batch.rows),
        "sequences": len(batch),
        "behaviour": torch.tensor(batch.logprobs, dtype=torch.float64),
        "advantages": fields["advantages"],
        "old": fields.get("old", logprobs_T.detach()),
        "reference": fields.get("reference"),
        "extra": fields,
    }
    return Tokens(**{**given, **changes})


def total_loss(algorithm, batch: Batch, logprobs_T: torch.Tensor, **changes) -> torch.Tensor:
    """What the trainer minimises."""
    tokens = tokens_of(batch, logprobs_T, **changes)
    return (torch.tensor(batch.fields["weights"], dtype=torch.float64) * algorithm.loss(tokens)[0]).sum()


def gradient(f: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray) -> np.ndarray:
    """By autograd, float64."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    f(x).backward()
    return x.grad.numpy()


def difference_quotients(f: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """The gradient of a scalar function by central differences."""
    steps = h * np.eye(len(x))
    return np.array([(float(f(x + step)) - float(f(x - step))) / (2 * h) for step in steps])


@st.composite
def batches(draw, min_size: int = 1, max_size: int = 6, prompt: str = "") -> tuple[Batch, np.ndarray]:
    """A batch with "old", "reference" and "values", and current log-probabilities, all near one another, [T]."""
    some = st.text("#.", max_size=3)
    marks = st.builds((prompt + "{}#{}").format, some, some)
    rows = draw(st.lists(st.tuples(marks, st.integers(0, 3), st.integers(0, 2)), min_size=min_size, max_size=max_size))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups: dict[int, list[Trajectory]] = {}
    for text, reward, group in rows:
        near = random.normal(-1.0, 0.1, text.count("#"))
        groups.setdefault(group, []).append(trajectory(text, float(reward), near, truncated=reward == 2))
    batch = Batch.of([Group(index, tuple(group)) for index, group in groups.items()])
    T = len(batch.tokens)
    near = {name: random.normal(-1.0, 0.1, T) for name in ("old", "reference", "values")}
    return batch.having(**near), random.normal(-1.0, 0.1, T)
