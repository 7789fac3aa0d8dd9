"""Random Hugging Face models, and canonical tensors of ours: what the parity tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from raytron.models.base import ShardedModel

FAMILIES = ("llama", "qwen2", "qwen3")


@st.composite
def sizes(draw, families=FAMILIES, tp: int = 1) -> dict:
    """Keyword arguments of a `transformers` configuration, `model_type` included, that can be cut over `tp`."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * per_group if tp == 1 else tp * per_group
    groups = groups if tp == 1 else draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    scaled = draw(st.booleans())
    theta = draw(st.sampled_from([10000.0, 500000.0]))
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaled:
        rope = {
            "rope_type": "llama3", "rope_theta": theta, "factor": draw(st.sampled_from([2.0, 8.0, 32.0])),
            "low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([2.0, 4.0])),
            "original_max_position_embeddings": draw(st.sampled_from([8, 32])),
        }  # fmt: skip
    return {
        "model_type": draw(st.sampled_from(families)),
        "vocab_size": draw(st.integers(11, 70)),
        "hidden_size": heads * draw(st.integers(1, 6)),  # head_dim is apart from it
        "head_dim": draw(st.sampled_from([2, 4, 6, 16])),
        "intermediate_size": tp * draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1 if tp == 1 else 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": rope,
    }


def random_model(sizes: dict, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A `transformers` model with every parameter random, biases and norms too."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(**sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            value = torch.randn(param.shape, generator=generator) * 0.3
            param.copy_(value + 1.0 if "norm" in name else value)
    return model.eval()


def canonical(model: ShardedModel, of=lambda param: param.data) -> dict[str, Tensor]:
    """Hugging Face name -> tensor, of a whole model's parameters, or of something shaped like them."""
    parts = ((slot.param, part) for slot in model.slots for part in slot.param.parts)
    return {part.name: part.view(of(param)) for param, part in parts}


def stored(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files, copied: the package's own are views of the mapped file."""
    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118 - not a mapping
    return found


def same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """The same names, shapes, dtypes and bits."""
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted
    )
