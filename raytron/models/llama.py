"""Llama 3, 3.1 and 3.2 (Grattafiori et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from raytron.models.arch import DecoderConfig, RopeScaling
from raytron.models.decoder import Decoder

__all__ = ["PRESETS", "Llama", "from_hf", "to_hf"]

_SAME = [
    f.name
    for f in fields(DecoderConfig)
    if f.name not in ("family", "qkv_bias", "qk_norm", "rope_theta", "rope_scaling", "num_labels", "lora")
]
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


class Llama(Decoder):
    """One rank's part of a Llama."""


def from_hf(config: Mapping[str, Any], **family: Any) -> DecoderConfig:
    """The architecture in a Hugging Face `config.json`.

    Raises ValueError for what this family does not do (another activation, rope type, sliding windows), and for a
    missing size: a default would be another model's.
    """
    for name in _SIZES:
        if config.get(name) is None:
            raise ValueError(f"{name} is missing; a Hugging Face configuration of this family gives it")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope type {kind!r} is not supported; default and llama3 are")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; silu is")
    if config.get("mlp_bias") or (config.get("attention_bias") and not family.get("qkv_bias")):
        raise ValueError("attention_bias and mlp_bias are not supported for this family")
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported; full attention is")
    given = {name: config[name] for name in _SAME if config.get(name) is not None}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    known.setdefault("num_key_value_heads", config["num_attention_heads"])
    known.setdefault("rms_norm_eps", 1e-6)
    if any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        known["num_labels"] = len(config.get("id2label") or range(config.get("num_labels", 2)))
    scaling = RopeScaling(**{k: rope[k] for k in asdict(RopeScaling()) if k in rope}) if kind == "llama3" else None
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    return DecoderConfig(**({"family": "llama"} | family), **known, rope_theta=theta, rope_scaling=scaling)


def to_hf(
    arch: DecoderConfig, model_type: str = "llama", architecture: str = "LlamaForCausalLM", **traits: bool
) -> dict[str, Any]:
    """`config.json` for `transformers`; rotary settings in the old and the new spelling.

    Raises ValueError for a trait that `model_type` does not have there: it would be lost.
    """
    for name in ("qkv_bias", "qk_norm"):
        if getattr(arch, name) != traits.get(name, False):
            raise ValueError(f"model: {model_type} has {name} {traits.get(name, False)}, not {getattr(arch, name)}")
    scores = {"num_labels": arch.num_labels} if arch.num_labels else {}
    if scores:
        architecture = architecture.replace("ForCausalLM", "ForSequenceClassification")
    scaling = {"rope_type": "llama3", **asdict(arch.rope_scaling)} if arch.rope_scaling else None
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        **scores,
        **{name: getattr(arch, name) for name in _SAME},  # None too: transformers' own token ids would be wrong
        "rope_theta": arch.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": arch.rope_theta, **(scaling or {"rope_type": "default"})},
    }


def _llama(hidden: int, layers: int, heads: int, ffn: int, **more: Any) -> DecoderConfig:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": ffn}
    return DecoderConfig(**sizes, bos_token_id=128000, eos_token_id=128001, **more)


_SCALED = {"max_position_embeddings": 131072, "rope_scaling": RopeScaling(8.0)}
_SMALL = {"max_position_embeddings": 131072, "rope_scaling": RopeScaling(32.0), "tie_word_embeddings": True}

PRESETS = {
    "llama-tiny": DecoderConfig(
        vocab_size=1024, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=176, max_position_embeddings=256, rope_theta=10000.0, tie_word_embeddings=True,
        initializer_range=0.1,
    ),
    "llama-3m": DecoderConfig(
        vocab_size=1024, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=640, max_position_embeddings=2048, rope_theta=10000.0, tie_word_embeddings=True,
        initializer_range=0.05,
    ),
    "llama3-8b": _llama(4096, 32, 32, 14336),
    "llama3-70b": _llama(8192, 80, 64, 28672),
    "llama3.1-8b": _llama(4096, 32, 32, 14336, **_SCALED),
    "llama3.1-70b": _llama(8192, 80, 64, 28672, **_SCALED),
    "llama3.1-405b": _llama(16384, 126, 128, 53248, **_SCALED),
    "llama3.2-1b": _llama(2048, 16, 32, 8192, head_dim=64, **_SMALL),
    "llama3.2-3b": _llama(3072, 28, 24, 8192, head_dim=128, **_SMALL),
}  # fmt: skip
