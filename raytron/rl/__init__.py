"""Reinforcement learning: rollouts, rewards, algorithms, and the loop that joins them.

Names are loaded when they are first used: a recipe's `--help` needs the configuration only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytron.rl.driver import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from raytron.rl import driver

    return getattr(driver, name)
