"""Architecture of a dense decoder: what `config.json` says, as a frozen dataclass. No torch.

Field names are Hugging Face's, so a preset, an override on the command line and a checkpoint speak of the same things.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from raytron.config import LoRAConfig, Typed

__all__ = ["DecoderConfig", "RopeScaling"]


@dataclass(frozen=True)
class RopeScaling(Typed):
    """Llama 3.1's frequency scaling: long wavelengths slowed by `factor`, a smooth ramp between the two bounds."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class DecoderConfig(Typed):
    """A pre-norm decoder with rotary positions, RMSNorm, SwiGLU and grouped-query attention.

    Raises:
        ValueError: values of another type, or sizes that do not fit together; names the field.
    """

    family: str = "llama"
    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 0
    """Size of one head; 0 stands for hidden_size / num_attention_heads."""
    max_position_embeddings: int = 8192
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    num_labels: int = 0
    """Instead of a language model's head: so many scores of every token (a critic, a reward model)."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters that are trained instead of the model; `config.json` says nothing of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model: {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_labels < 0:
            raise ValueError(f"model: num_labels is {self.num_labels}; it must be 0 (a language model) or more")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups < 1 or heads % groups:
            raise ValueError(
                f"model: num_attention_heads {heads} is not divisible by num_key_value_heads {groups}; every key/value "
                "head serves the same number of query heads"
            )
        if not self.head_dim:
            if self.hidden_size % heads:
                raise ValueError(
                    f"model: hidden_size {self.hidden_size} is not divisible by num_attention_heads {heads}; "
                    "set head_dim, or choose other sizes"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if self.head_dim % 2:
            raise ValueError(f"model: head_dim {self.head_dim} must be even for rotary positions")

    def replace(self, **changes: Any) -> DecoderConfig:
        """A copy with some fields changed; `head_dim` follows hidden_size and heads unless it was set apart from them.

        Raises ValueError for a field that does not exist.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"model.overrides: unknown field {name!r}; the architecture has {', '.join(known)}")
        if self.head_dim == self.hidden_size // self.num_attention_heads:
            changes.setdefault("head_dim", 0)
        return dataclasses.replace(self, **changes)

    def to_hf(self) -> dict[str, Any]:
        """What `config.json` says of this architecture, as its family writes it."""
        from raytron.models.registry import family_of  # the registry knows the families, which know this file

        return family_of(self).to_hf(self)

    def check_sequence(self, sequence_length: int) -> None:
        """ValueError if a sequence is longer than the rotary positions were made for."""
        if sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {sequence_length} exceeds the model's max_position_embeddings "
                f"{self.max_position_embeddings}; shorten it, or raise max_position_embeddings in model.overrides"
            )
