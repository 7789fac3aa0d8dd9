"""What travels between rollouts, algorithms and the trainer: trajectories, groups, the flat batch, a loss's view of it.

    Environment + engine -> Trajectory, n of a prompt = Group -> B groups = Batch (flat) -> Tokens (a micro-batch)

Legend: T tokens of all trajectories one behind the other, N trajectories. No Ray here; torch only in `Tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Batch", "Group", "Tokens", "Trajectory"]


@dataclass(frozen=True)
class Trajectory:
    """One episode as token ids, exactly as the engine saw and chose them; nothing is ever tokenized again.

    tokens int32 [T]: prompt, answers and observations. chosen bool [T]: the policy chose this token; all others are
    masked from loss and length. logprobs float32 [T]: what the engine that chose it gave it (0 elsewhere). versions
    int32 [T]: of the weights that chose it (-1 elsewhere). reward: None when it could not be judged (a failed
    environment, a verifier's timeout): such a trajectory is left out, it is not worth zero. truncated: the token budget
    ended it, so no end token was chosen. info: numbers and texts for logs ("error" says why the reward is None).
    """

    tokens: np.ndarray
    chosen: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    reward: float | None
    truncated: bool = False
    info: Mapping[str, float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {"tokens": np.int32, "chosen": np.bool_, "logprobs": np.float32, "versions": np.int32}
        for name, kind in kinds.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        if len({getattr(self, name).shape for name in kinds}) != 1 or self.tokens.ndim != 1:
            shapes = {name: getattr(self, name).shape for name in kinds}
            raise ValueError(f"a trajectory's arrays must be 1-D and of one length; they are {shapes}")

    @property
    def length(self) -> int:
        """Tokens that the policy chose."""
        return int(self.chosen.sum())

    @property
    def version(self) -> int:
        """Of the oldest weights that chose a token; -1 if none was chosen."""
        return int(self.versions[self.chosen].min()) if self.chosen.any() else -1


@dataclass(frozen=True)
class Group:
    """The trajectories of one prompt. index: its place in the run's prompt order, unique in a run."""

    index: int
    trajectories: tuple[Trajectory, ...]

    @property
    def valid(self) -> tuple[Trajectory, ...]:
        """Those with a reward and at least one chosen token."""
        return tuple(t for t in self.trajectories if t.reward is not None and t.length)

    @property
    def rewards(self) -> np.ndarray:
        """Of the valid ones, float64."""
        return np.array([t.reward for t in self.valid], dtype=np.float64)

    @property
    def version(self) -> int:
        """The oldest version of any trajectory."""
        return min((t.version for t in self.valid), default=-1)


@dataclass(frozen=True)
class Batch:
    """The valid trajectories of some groups as flat arrays: what a training step is given.

    tokens int32 [T], chosen bool [T], logprobs float32 [T] (the engines'), versions int32 [T]; lengths int32 [N] (all
    tokens), rewards float64 [N], groups int64 [N] (each one's group index), truncated bool [N]. fields: further float32
    arrays [T] by name, aligned with the tokens they are about (element t is about choosing tokens[t]):

        old         log-probabilities by the trainer's weights when the step began
        reference   by the reference model
        values      the critic's estimates before choosing the token
        advantages  what the policy loss multiplies
        returns     what the critic is fitted to
        weights     what the token's loss is multiplied by before all are summed: the reduction, 0 where not `chosen`
    """

    tokens: np.ndarray
    chosen: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    lengths: np.ndarray
    rewards: np.ndarray
    groups: np.ndarray
    truncated: np.ndarray
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Batch:
        """From groups, in their order. ValueError when none has a valid trajectory."""
        pairs = [(group.index, t) for group in groups for t in group.valid]
        if not pairs:
            raise ValueError("no trajectory of the batch has a reward; the rollouts' errors say why")
        trajectories = [t for _, t in pairs]

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(t, name) for t in trajectories])

        return cls(
            tokens=joined("tokens"),
            chosen=joined("chosen"),
            logprobs=joined("logprobs"),
            versions=joined("versions"),
            lengths=np.array([len(t.tokens) for t in trajectories], dtype=np.int32),
            rewards=np.array([t.reward for t in trajectories], dtype=np.float64),
            groups=np.array([index for index, _ in pairs], dtype=np.int64),
            truncated=np.array([t.truncated for t in trajectories], dtype=bool),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """First token of each trajectory, and behind them the end of the last: int64 [N + 1]."""
        return np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    @property
    def rows(self) -> np.ndarray:
        """The trajectory of each token, int64 [T]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def response_lengths(self) -> np.ndarray:
        """Chosen tokens of each trajectory, int64 [N]."""
        return np.add.reduceat(self.chosen.astype(np.int64), self.starts[:-1])

    def having(self, **fields: np.ndarray) -> Batch:
        """The same with further fields, float32 [T] each."""
        for name, values in fields.items():
            if values.shape != self.tokens.shape:
                raise ValueError(f"field {name} has shape {values.shape}, the batch {self.tokens.shape}")
        return replace(self, fields={**self.fields, **{k: v.astype(np.float32) for k, v in fields.items()}})

    def select(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Some trajectories, in the given order."""
        starts = self.starts
        at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in rows]) if len(rows) else np.zeros(0, int)
        flat = {name: getattr(self, name)[at] for name in ("tokens", "chosen", "logprobs", "versions")}
        each = {name: getattr(self, name)[rows] for name in ("lengths", "rewards", "groups", "truncated")}
        return Batch(**flat, **each, fields={name: values[at] for name, values in self.fields.items()})


@dataclass(frozen=True)
class Tokens:
    """What a loss sees of one packed micro-batch: 1-D tensors over its T tokens, whole trajectories only.

    logprobs: of the chosen tokens by the current weights at the sampling temperature, fp32 or fp64, with gradient.
    entropy: of the whole distribution, with gradient if `Algorithm.entropy` is used, else None. mask: 1.0 where the
    policy chose the token, 0.0 elsewhere (prompt, observations, padding); everything else is finite but meaningless
    there. sequence int64: which trajectory of the micro-batch, 0 .. sequences - 1 (padding belongs to the last). The
    others as in `Batch.fields`; behaviour: the engine's log-probabilities (`Batch.logprobs`).
    """

    logprobs: Tensor
    mask: Tensor
    sequence: Tensor
    sequences: int
    behaviour: Tensor
    advantages: Tensor
    old: Tensor
    reference: Tensor | None = None
    entropy: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
