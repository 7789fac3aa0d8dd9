"""Small random Hugging Face models on disk, with a tokenizer and a chat template, for tests that generate."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from raytron.data.tokenizer import HFTokenizer, train_bpe
from tests.models.hugging_face import random_model

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    '{"name": "value", "number": 12345, "list": [1, 2, 3], "nothing": null, "truth": true}',
    "Ein schöner Tag: Grüße über die Straße. 日本語のテキストもあります。 ✓ naïve café",
)
SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "head_dim": 32,  # the smallest that vLLM's CPU kernels know
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


@lru_cache(maxsize=1)
def tokenizer() -> HFTokenizer:
    """Byte-level BPE of 320 tokens; id 0 ends the text."""
    return train_bpe(_CORPUS * 4, 320)


def make_model(folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: object) -> Path:
    """A Hugging Face directory with a random model of `SIZES` and `sizes`; every seed other weights.

    Weights are large enough for the likeliest token to be it by far, so that greedy decoding does not hang on the last
    bit of a sum, and the output matrix small enough for log-probabilities to be as exact as fp32 makes them.
    """
    folder, words = Path(folder), tokenizer()
    model = random_model({**SIZES, "vocab_size": words.vocab_size, **sizes}, seed, dtype)
    model.get_output_embeddings().weight.data *= 0.4
    model.config.bos_token_id = model.config.eos_token_id = words.eod
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = words.eod
    model.save_pretrained(folder)
    words.save(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    return folder


class Reference:
    """The same model in `transformers`, in double precision: what the distribution of every token should be."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)

    def logits(self, tokens: list[int]) -> Tensor:
        """logits_TV of the token after each of `tokens`."""
        with torch.no_grad():
            return self.model.eval()(torch.tensor([tokens])).logits[0]

    def continuation(self, prompt: tuple[int, ...], output: list[int]) -> Tensor:
        """logits_TV that each token of `output` was chosen from, teacher-forced."""
        return self.logits([*prompt, *output])[len(prompt) - 1 : -1]
