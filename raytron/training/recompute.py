"""Activation recomputation: whole layers, or modules chosen by name (Chen et al. 2016, Korthikanti et al. 2022)."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from raytron.config import RecomputeConfig
from raytron.models.base import ShardedModel

__all__ = ["apply_recompute"]


def apply_recompute(model: ShardedModel, config: RecomputeConfig) -> None:
    """Make the chosen modules of `model` drop their activations in the forward and compute them again in the backward.

    Raises ValueError if a name matches no module.
    """
    if config.mode == "none":
        return
    if config.mode == "full":
        chosen = [layer for chunk in model.chunks for layer in chunk.layers]
    else:
        named = {name: [m for path, m in model.named_modules() if _last(path) == name] for name in config.modules}
        if missing := [name for name, found in named.items() if not found]:
            there = sorted({_last(path) for path, m in model.named_modules() if path and not _last(path).isdigit()})
            raise ValueError(f"recompute.modules: no module named {missing[0]!r}; this model has {', '.join(there)}")
        chosen = [module for found in named.values() for module in found]
    for module in chosen:
        _wrap(module)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _wrap(module: nn.Module) -> None:
    # No random numbers are drawn inside a layer from global state, so there is none to save and restore.
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
