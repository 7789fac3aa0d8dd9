"""Outputs that fit a JSON schema or a regular expression: llguidance says which tokens may come next.

llguidance (Rust, Apache/MIT) was chosen over xgrammar (needs Triton to import) and outlines-core (compiles an automaton
ahead: seconds for large schemas): it walks an Earley parser token by token in tens of microseconds, without a warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytron.inference.types import SamplingParams

__all__ = ["Grammars", "allowed"]


class Grammars:
    """Makes matchers for one tokenizer.

    Args:
        tokenizer_json: what `tokenizer.json` says; None for a model without one.
        vocab_size: of the model; ids past the tokenizer's are never allowed.
        eos: the id that may come when the output is complete.
    """

    def __init__(self, tokenizer_json: str | None, vocab_size: int, eos: Sequence[int]) -> None:
        self._json, self._vocab_size, self._eos = tokenizer_json, vocab_size, list(eos)
        self._tokenizer: Any = None

    def matcher(self, params: SamplingParams) -> Any | None:
        """A fresh matcher for what `params` asks; None where it asks nothing.

        Raises ValueError for a grammar that is wrong, or a model without a tokenizer.
        """
        if params.json_schema is None and params.regex is None:
            return None
        import llguidance

        if self._json is None:
            raise ValueError("json_schema and regex need a tokenizer; this model's directory has no tokenizer.json")
        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(
                self._json, n_vocab=self._vocab_size, eos_token=self._eos if self._eos else None
            )
        name = "regex" if params.json_schema is None else "json_schema"
        try:
            if params.regex is not None:
                grammar = llguidance.LLMatcher.grammar_from_regex(params.regex)
            else:
                grammar = llguidance.LLMatcher.grammar_from_json_schema(params.json_schema)
            matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None
        if matcher.is_error():
            raise ValueError(f"{name}: {matcher.get_error()}")
        return matcher


def allowed(matchers: Sequence[Any | None], vocab_size: int) -> Tensor | None:
    """bool [B, V]: what each row's matcher permits next (rows without one: everything); None if no row has one."""
    if not any(matcher is not None for matcher in matchers):
        return None
    words = np.full((len(matchers), -(-vocab_size // 32)), -1, dtype=np.int32)
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            matcher.unsafe_compute_mask_ptr(words[row].ctypes.data, words[row].nbytes)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=vocab_size)
    return torch.from_numpy(bits).bool()
