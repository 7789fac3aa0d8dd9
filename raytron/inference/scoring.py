"""Whole sequences scored by a classifier: what a reward model says of answers.

A score is that of the last token, which has seen all others (transformers' `LlamaForSequenceClassification` takes the
last that is not padding). Sequences of similar length are computed side by side, padded at their ends: attention is
causal, so padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from raytron.config import EngineConfig
from raytron.inference.engine import model_dtype
from raytron.models import from_pretrained, read_arch
from raytron.parallel.collectives import World

__all__ = ["Scorer", "check_tokens"]


class Scorer:
    """One rank of a sequence classifier.

    Args:
        world: this rank's seat; the model is cut over tp.
        path: Hugging Face directory of a model with `num_labels`.
        dtype: of the computation; auto is what its config.json says.
        max_batch_tokens: computed side by side, padding included; a longer sequence is computed alone.
        reproducible: the same bits for the same tokens, whatever is beside them; the CPU only.

    Attributes:
        arch: the model's architecture.

    Raises:
        ValueError: no model there, a language model, or one that tp does not divide.
    """

    def __init__(
        self,
        world: World | None,
        path: str | Path,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        max_batch_tokens: int = 16384,
        reproducible: bool = False,
    ) -> None:
        self.arch = read_arch(path)
        if not self.arch.num_labels:
            raise ValueError(f"{path}: a language model; a reward model is a ...ForSequenceClassification (num_labels)")
        self._model = from_pretrained(path, world, model_dtype(EngineConfig(path=str(path), dtype=dtype)))
        self._model.use_kernels(reproducible)
        self._most = max_batch_tokens

    def score(self, sequences: Sequence[Sequence[int]]) -> np.ndarray | None:
        """Of N token sequences float32 [N, num_labels], from the first rank; collective over tp.

        Raises ValueError for a sequence without tokens, longer than the model's context, or with unknown ids.
        """
        for tokens in sequences:
            check_tokens(self.arch, tokens)
        scores_NL = np.zeros((len(sequences), self.arch.num_labels), np.float32)
        for rows in _batches([len(tokens) for tokens in sequences], self._most):
            scores_NL[rows] = self._batch([sequences[row] for row in rows])
        return None if self._model.world.rank else scores_NL

    @torch.no_grad()
    def _batch(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        lengths = [len(tokens) for tokens in sequences]
        tokens_NT = np.zeros((len(sequences), max(lengths)), np.int64)
        for row, tokens in enumerate(sequences):
            tokens_NT[row, : len(tokens)] = tokens
        scores_NTL = self._model(torch.from_numpy(tokens_NT).to(self._model.world.device))
        last = torch.tensor(lengths, device=scores_NTL.device) - 1
        return scores_NTL[torch.arange(len(lengths)), last].float().cpu().numpy()


def check_tokens(arch: Any, tokens: Sequence[int]) -> None:
    """ValueError for a sequence that a model of `arch` cannot score: empty, too long, or with ids it does not know."""
    if not 1 <= len(tokens) <= arch.max_position_embeddings:
        raise ValueError(
            f"a sequence of {len(tokens)} tokens cannot be scored; the model takes 1 to {arch.max_position_embeddings}"
        )
    if not 0 <= min(tokens) <= max(tokens) < arch.vocab_size:
        raise ValueError(
            f"token ids {min(tokens)} to {max(tokens)} do not fit the model's vocabulary of {arch.vocab_size}; are "
            "they another tokenizer's?"
        )


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows to compute side by side, the longest first; a batch counts as many rows as its first is long."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
