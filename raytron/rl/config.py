"""What an RL run is told: frozen dataclasses as in `raytron.config`. Neither torch nor ray."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raytron.config import Typed

__all__ = ["AlgorithmConfig", "TaskConfig"]


@dataclass(frozen=True)
class AlgorithmConfig(Typed):
    """Which policy-gradient algorithm, and its numbers; None leaves a number to the algorithm, whose file states it.

    Raises ValueError for a number out of range. A field that the algorithm would not read is refused by the algorithm.
    """

    name: str = "grpo"
    """grpo | dr_grpo | dapo | gspo | cispo | rloo | reinforce_pp | reinforce_pp_baseline | ppo."""
    clip_low: float | None = None
    """The ratio is clipped at 1 - clip_low; 1 turns the lower bound off."""
    clip_high: float | None = None
    """The ratio is clipped at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of ratio x advantage where the advantage is negative (Ye et al. 2020), above 1; 0 turns it off."""
    kl: Literal["none", "reward", "loss"] | None = None
    """Where the KL divergence to the reference model is charged."""
    kl_coefficient: float | None = None
    """What a nat of it costs."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """k1 in the reward; k2 or k3 (times the ratio) in the loss: see `raytron.rl.kl`."""
    entropy_coefficient: float | None = None
    """What a nat of the whole distribution's entropy earns in the loss."""
    reduction: Literal["token", "sequence", "constant"] | None = None
    """Mean over tokens; over sequences of their mean over tokens; sum over tokens / (sequences x constant_length)."""
    constant_length: int | None = None
    """The longest response: divisor of the constant reduction, and where the overlong penalty is whole."""
    normalize_std: bool | None = None
    """Divide advantages by the rewards' deviation in the group, or (REINFORCE++, PPO) whiten them over the batch."""
    correction: (
        Literal["none", "tis", "sequence-tis", "icepop", "mask-token", "mask-sequence", "mask-sequence-product"] | None
    ) = None
    """What happens to tokens that trainer and engine judge differently: see `raytron.rl.corrections`."""
    correction_low: float | None = None
    """Lower bound of trainer's / engine's probability."""
    correction_high: float | None = None
    """Upper bound of the same."""
    decoupled: bool | None = None
    """The ratio's denominator is the trainer's own log-probability when the step began (True) or the engine's."""
    gamma: float | None = None
    """Discount per chosen token (REINFORCE++, PPO)."""
    lam: float | None = None
    """GAE's lambda (PPO)."""
    value_clip: float | None = None
    """The critic's estimate may move so far in a step (PPO); 0 turns it off."""
    dynamic_sampling: bool | None = None
    """Leave out groups whose rewards are all alike, and sample others in their place."""
    overlong_buffer: int | None = None
    """Responses are charged for coming so near to constant_length; 0 turns it off."""
    overlong_penalty: float | None = None
    """What a response of constant_length or more is charged."""
    overlong_filtering: bool | None = None
    """Truncated responses count in rewards and denominators but are not learned from."""
    epochs: int = 1
    """Times a batch is trained on."""
    minibatches: int = 1
    """Optimizer updates of one epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"constant_length": 1, "epochs": 1, "minibatches": 1}
        most = {"clip_low": 1.0, "gamma": 1.0, "lam": 1.0}
        for name, value in vars(self).items():
            if isinstance(value, int | float):
                low, high = least.get(name, 0), most.get(name, math.inf)
                if not (low <= value <= high and math.isfinite(value)):
                    raise ValueError(f"algorithm.{name} is {value}; it must lie between {low} and {high}")
        if self.dual_clip is not None and 0 < self.dual_clip <= 1:
            raise ValueError(f"algorithm.dual_clip is {self.dual_clip}; it must exceed 1 (3 is usual), or be 0")

    @property
    def stated(self) -> dict[str, Any]:
        """The fields that an algorithm may choose, where they are given."""
        optional = (f.name for f in dataclasses.fields(self) if f.default is None)
        return {name: getattr(self, name) for name in optional if getattr(self, name) is not None}

    def filled(self, defaults: Mapping[str, Any]) -> AlgorithmConfig:
        """With `defaults` for what is not stated. ValueError for what is, yet has no default: nothing would read it."""
        unused = [name for name, value in self.stated.items() if defaults.get(name) is None]
        if unused:
            raise ValueError(
                f"algorithm {self.name}, set up like this, does not use {', '.join(unused)}; leave it out, or turn on "
                "what it belongs to (kl, correction, overlong_buffer)"
            )
        return dataclasses.replace(self, **{**defaults, **self.stated})


@dataclass(frozen=True)
class TaskConfig(Typed):
    """What is to be learnt."""

    name: str = "echo-digit"
    """echo-digit | copy | reverse | countdown | higher-lower | calculator | gsm8k."""
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Fields of the task (`raytron.rl.tasks`): `length 6 digits 4` for copy, `path train.jsonl` for gsm8k."""
