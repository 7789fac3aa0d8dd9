"""Policy-gradient algorithms, one file each; a plain dict says which there are."""

from __future__ import annotations

from raytron.rl.algorithms.base import Algorithm
from raytron.rl.algorithms.cispo import CISPO
from raytron.rl.algorithms.dapo import DAPO
from raytron.rl.algorithms.dr_grpo import DrGRPO
from raytron.rl.algorithms.grpo import GRPO
from raytron.rl.algorithms.gspo import GSPO
from raytron.rl.algorithms.ppo import PPO
from raytron.rl.algorithms.reinforce_pp import ReinforcePP
from raytron.rl.algorithms.reinforce_pp_baseline import ReinforcePPBaseline
from raytron.rl.algorithms.rloo import RLOO
from raytron.rl.config import AlgorithmConfig

__all__ = ["ALGORITHMS", "Algorithm", "make"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "rloo": RLOO,
    "reinforce_pp": ReinforcePP,
    "reinforce_pp_baseline": ReinforcePPBaseline,
    "ppo": PPO,
}


def make(config: AlgorithmConfig) -> Algorithm:
    """The algorithm a run asks for. ValueError for a name there is none of, and for settings it has no use for."""
    if config.name not in ALGORITHMS:
        raise ValueError(f"algorithm.name {config.name!r} is unknown; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[config.name](config)
