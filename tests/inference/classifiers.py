"""Random sequence classifiers of transformers', and what they say: the oracle of everything that scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

VOCABULARY = 61


def random_classifier(
    folder: Path, labels: int = 1, vocabulary: int = VOCABULARY
) -> tuple[Path, LlamaForSequenceClassification]:
    """A Hugging Face directory, and the model in it."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_labels=labels, pad_token_id=None,
        attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    return folder, model


def scores_of(model: LlamaForSequenceClassification, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """[N, labels], one sequence after the other."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([list(tokens)])).logits for tokens in sequences]).numpy()


def sequences(count: int, vocabulary: int = VOCABULARY, longest: int = 40) -> list[list[int]]:
    """Random ones of different lengths."""
    random = np.random.default_rng(0)
    return [random.integers(0, vocabulary, random.integers(1, longest + 1)).tolist() for _ in range(count)]
