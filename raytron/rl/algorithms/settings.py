"""From what a run states of an algorithm to every number of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from raytron.rl.config import AlgorithmConfig
from raytron.rl.corrections import CORRECTIONS

__all__ = ["COMMON", "resolved"]

COMMON = AlgorithmConfig(
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=0.0,
    kl="none",
    kl_coefficient=0.001,
    kl_estimator="k3",
    entropy_coefficient=0.0,
    reduction="token",
    correction="none",
    decoupled=False,
    dynamic_sampling=False,
    overlong_buffer=0,
    overlong_penalty=1.0,
    overlong_filtering=False,
)
"""What an algorithm has that states nothing else. A reference model or a pass for old log-probabilities is only paid
for when asked: against the engine's own log-probabilities one ratio corrects for updates, staleness and rounding."""


def resolved(config: AlgorithmConfig, stated: AlgorithmConfig, unused: Collection[str] = ()) -> AlgorithmConfig:
    """`config` with the algorithm's `stated` numbers, or the common ones, where it names none.

    Some hang on another choice: a correction brings its bounds, the KL's place its estimator. Raises ValueError for
    what is set but would not be read (`unused`, and what belongs to something turned off), and for combinations in
    which a number would not mean what it says.
    """
    defaults = {name: value for name, value in {**COMMON.stated, **stated.stated}.items() if name not in unused}
    chosen = {**defaults, **config.stated}
    full = config.filled({**defaults, **_dependent(chosen), "constant_length": config.constant_length})
    for holds, message in _rules(full):
        if not holds:
            raise ValueError(f"algorithm {config.name}: {message}")
    return full


def _dependent(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that hang on another choice; None where that turns them off."""
    result: dict[str, Any] = {}
    if chosen["kl"] == "none":
        result |= {"kl_coefficient": None, "kl_estimator": None}
    elif chosen["kl"] == "reward":
        result |= {"kl_estimator": "k1"}
    if not chosen["overlong_buffer"]:
        result |= {"overlong_penalty": None}
    if correction := CORRECTIONS.get(chosen["correction"]):
        result |= {"correction_low": correction.low, "correction_high": correction.high}
        result |= {"decoupled": True} if correction.reweighs else {}
    return result


def _rules(c: AlgorithmConfig) -> list[tuple[bool, str]]:
    correction = CORRECTIONS.get(c.correction)
    return [
        (
            c.kl == "none" or (c.kl_estimator == "k1") == (c.kl == "reward"),
            f"kl_estimator {c.kl_estimator} with kl {c.kl!r} has the wrong gradient; take k1 in the reward, k2 or k3 "
            "in the loss",
        ),
        (
            c.decoupled or not (correction and correction.reweighs),
            f"correction {c.correction} multiplies by trainer / engine, which the ratio contains already unless "
            "decoupled; set decoupled=True, or take one of the masks",
        ),
        (
            correction is None or c.correction_low < c.correction_high,
            f"correction_low {c.correction_low} must be below correction_high {c.correction_high}",
        ),
        (
            bool(c.constant_length) or (c.reduction != "constant" and not c.overlong_buffer),
            "reduction constant and overlong_buffer need constant_length, the most tokens a response may have",
        ),
        (
            (c.overlong_buffer or 0) <= (c.constant_length or math.inf),
            f"overlong_buffer {c.overlong_buffer} exceeds constant_length {c.constant_length}",
        ),
    ]
