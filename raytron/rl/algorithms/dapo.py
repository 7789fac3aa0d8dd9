"""DAPO: GRPO with four changes for long reasoning (Yu et al. 2025).

    clip-higher         clip 0.8 .. 1.28: unlikely tokens may grow
    dynamic sampling    groups whose rewards are all alike are left out and others sampled
    token-level loss    mean over all tokens: long answers count by their length
    overlong shaping    overlong_buffer and constant_length turn it on (the paper: 4096 of 20480, penalty 1);
                        overlong_filtering is the paper's alternative

A_i as in GRPO; no KL.
"""

from __future__ import annotations

from raytron.rl.algorithms.grpo import GRPO
from raytron.rl.config import AlgorithmConfig

__all__ = ["DAPO"]


class DAPO(GRPO):
    """Decoupled clip and dynamic sampling policy optimization."""

    defaults = AlgorithmConfig(clip_high=0.28, dynamic_sampling=True, reduction="token", normalize_std=True)
