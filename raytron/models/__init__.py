"""Model families, and how to get a model: `build` from a preset, `from_pretrained` from a Hugging Face directory.

A family is one file with an architecture reader (`from_hf`), its inverse (`to_hf`), a `ShardedModel` and its presets;
here it gets one line.
"""

from __future__ import annotations

from raytron.models import llama, qwen
from raytron.models.adapters import load_adapter
from raytron.models.loading import begin, build, from_pretrained, load_weights, read_arch
from raytron.models.registry import FAMILIES, PRESETS, Family, family_of, resolve

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Family",
    "begin",
    "build",
    "family_of",
    "from_pretrained",
    "llama",
    "load_adapter",
    "load_weights",
    "qwen",
    "read_arch",
    "resolve",
]
