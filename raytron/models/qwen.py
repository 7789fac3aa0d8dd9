"""Qwen 2.5 (biases on Q, K and V) and the dense Qwen 3 (norms on Q and K, head size of its own). Otherwise a Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytron.models import llama
from raytron.models.arch import DecoderConfig
from raytron.models.decoder import Decoder

__all__ = ["PRESETS", "Qwen", "from_hf", "to_hf"]

_TRAITS = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class Qwen(Decoder):
    """One rank's part of a Qwen 2.5 or dense Qwen 3."""


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The architecture in a Hugging Face `config.json` of model type qwen2 or qwen3."""
    family = config["model_type"]
    defaults = {"head_dim": 128} if family == "qwen3" else {}  # transformers', not hidden_size / heads
    return llama.from_hf(defaults | dict(config), family=family, **_TRAITS[family])


def to_hf(arch: DecoderConfig) -> dict[str, Any]:
    """`config.json` for `transformers`."""
    config = llama.to_hf(arch, arch.family, _CLASSES[arch.family], **_TRAITS[arch.family])
    return config | {"use_sliding_window": False}


def _qwen(family: str, hidden: int, layers: int, heads: int, groups: int, ffn: int, **more: Any) -> DecoderConfig:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": ffn}
    base = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "num_key_value_heads": groups, "eos_token_id": 151643}
    return DecoderConfig(family=family, **sizes, **base, **_TRAITS[family], **more)


def _qwen25(*sizes: int, vocab: int = 152064, tied: bool = False) -> DecoderConfig:
    return _qwen("qwen2", *sizes, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=32768)


def _qwen3(*sizes: int, tied: bool = False) -> DecoderConfig:
    more = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": tied}
    return _qwen("qwen3", *sizes, **more)


PRESETS = {
    "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 4864, vocab=151936, tied=True),
    "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960, vocab=151936, tied=True),
    "qwen2.5-3b": _qwen25(2048, 36, 16, 2, 11008, vocab=151936, tied=True),
    "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18944),
    "qwen2.5-14b": _qwen25(5120, 48, 40, 8, 13824),
    "qwen2.5-32b": _qwen25(5120, 64, 40, 8, 27648),
    "qwen2.5-72b": _qwen25(8192, 80, 64, 8, 29568),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600),
}
