"""Megatron's mock data: documents that count upwards, so that a run needs no corpus and its loss must fall fast.

Lengths and tokens are those of Megatron-core's ``MockGPTLowLevelDataset``, so mock runs of both see the same samples.
Random tokens would have been simpler, but nothing can be learnt from them.
"""

from __future__ import annotations

import numpy as np


class MockDocuments:
    """100,000 documents of 1 to 4,095 tokens ``1, 2, ... mod vocab_size`` and the end-of-document id.

    Has the reading interface of `IndexedDataset`: `sequence_lengths` (int32), `get`, `identity`.
    """

    seed = 0
    size = 100_000
    max_length = 4096

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size = vocab_size
        self.eod = eod
        rng = np.random.default_rng(self.seed)
        self.sequence_lengths = rng.integers(1, self.max_length, size=self.size, dtype=np.int32)

    def __len__(self) -> int:
        return self.size

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens (int64; default: the rest) of document `index` from token `offset`."""
        total = int(self.sequence_lengths[index])
        stop = total if length is None else offset + length
        tokens = np.arange(offset + 1, stop + 1, dtype=np.int64) % self.vocab_size
        if stop == total and stop > offset:
            tokens[-1] = self.eod
        return tokens

    @property
    def identity(self) -> dict[str, object]:
        return {"mock": True, "vocab_size": self.vocab_size, "eod": self.eod}
