"""Dr.GRPO: GRPO without its two biases, to easy or hard prompts and to long wrong answers (Liu et al. 2025).

    A_i = R_i - mean        sum over tokens / (sequences x constant_length)        clip 0.8 .. 1.2, no KL

constant_length must be given: the most tokens a response may have.
"""

from __future__ import annotations

from raytron.rl.algorithms.grpo import GRPO
from raytron.rl.config import AlgorithmConfig

__all__ = ["DrGRPO"]


class DrGRPO(GRPO):
    """GRPO done right."""

    defaults = AlgorithmConfig(reduction="constant", normalize_std=False)
