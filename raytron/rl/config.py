"""What an RL run is told: frozen dataclasses as in `raytron.config`. Neither torch nor ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from raytron.config import Typed

__all__ = ["AlgorithmConfig", "TaskConfig"]


@dataclass(frozen=True)
class AlgorithmConfig(Typed):
    """Which policy-gradient algorithm, and its numbers; None leaves a number to the algorithm."""

    name: str = "grpo"
    """grpo | dr_grpo | dapo | gspo | cispo | rloo | reinforce_pp | reinforce_pp_baseline | ppo."""


@dataclass(frozen=True)
class TaskConfig(Typed):
    """What is to be learnt."""

    name: str = "echo-digit"
    """echo-digit | copy | reverse | countdown | higher-lower | calculator | gsm8k."""
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Fields of the task (`raytron.rl.tasks`): `length 6 digits 4` for copy, `path train.jsonl` for gsm8k."""
