"""What an RL run is told: frozen dataclasses as in `raytron.config`. Neither torch nor ray."""

from __future__ import annotations

from dataclasses import dataclass

from raytron.config import Typed

__all__ = ["AlgorithmConfig"]


@dataclass(frozen=True)
class AlgorithmConfig(Typed):
    """Which policy-gradient algorithm, and its numbers; None leaves a number to the algorithm."""

    name: str = "grpo"
    """grpo | dr_grpo | dapo | gspo | cispo | rloo | reinforce_pp | reinforce_pp_baseline | ppo."""
