"""Which families there are: plain dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raytron.config import ModelConfig
from raytron.models import llama, qwen
from raytron.models.adapters import resolve_lora
from raytron.models.base import ShardedModel

__all__ = ["FAMILIES", "PRESETS", "Family", "family_of", "resolve"]


@dataclass(frozen=True)
class Family:
    """How to read, write and build one family. `from_hf` and `to_hf` translate `config.json`."""

    model: type[ShardedModel]
    from_hf: Callable[[Mapping[str, Any]], Any]
    to_hf: Callable[[Any], dict[str, Any]]


# model_type in config.json -> family
FAMILIES: dict[str, Family] = {
    "llama": Family(llama.Llama, llama.from_hf, llama.to_hf),
    "qwen2": Family(qwen.Qwen, qwen.from_hf, qwen.to_hf),
    "qwen3": Family(qwen.Qwen, qwen.from_hf, qwen.to_hf),
}

# name -> architecture
PRESETS: dict[str, Any] = {**llama.PRESETS, **qwen.PRESETS}


def family_of(arch: Any) -> Family:
    """The family an architecture belongs to."""
    return FAMILIES[arch.family]


def resolve(config: ModelConfig) -> Any:
    """The architecture a run asks for: that of its directory or preset, with its overrides and adapters.

    Raises ValueError for an unknown preset or field, a model its family cannot be saved as, or unusable adapters.
    """
    if config.path is not None:
        from raytron.models.loading import read_arch

        arch = read_arch(config.path)
    elif config.preset in PRESETS:
        arch = PRESETS[config.preset]
    else:
        raise ValueError(f"model.preset {config.preset!r} is unknown; there are {', '.join(PRESETS)}")
    arch = arch.replace(**config.overrides) if config.overrides else arch
    arch = arch.replace(lora=resolve_lora(config.lora))
    arch.to_hf()  # a trait its family lacks fails here, not at the first checkpoint
    return arch
