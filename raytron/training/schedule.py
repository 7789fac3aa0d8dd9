"""Learning rate as a pure function of the committed step."""

from __future__ import annotations

import math

from raytron.config import OptimizerConfig, ScheduleConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up from lr / warmup to lr, then the decay.

    cosine and linear reach min_lr at `decay_steps` (default `steps`) and stay there; wsd (Hu et al. 2024) holds lr and
    falls linearly to min_lr over the last `decay_steps` (default a fifth of the run); constant holds lr.
    """
    top, low, warmup = optimizer.lr, optimizer.min_lr, schedule.warmup_steps
    if step < warmup:
        return top * (step + 1) / warmup
    if schedule.kind == "constant":
        return top
    if schedule.kind == "wsd":
        length = schedule.decay_steps or max(1, steps // 5)
        done = (step - (steps - length)) / length
        return top - (top - low) * min(max(done, 0.0), 1.0)
    end = schedule.decay_steps or steps
    done = min((step - warmup) / max(end - warmup, 1), 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1.0 - done
    return low + (top - low) * share
