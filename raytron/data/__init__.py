"""From text on disk to micro-batches: tokenizers, Megatron's ``.bin/.idx``, GPT samples, blends, examples, the loader.

The order of the data is a pure function of the sample index (ARCHITECTURE, idea 3): sample ``i`` of a run is fixed by
the dataset, the seed and ``i``, and the only state of a loader is how many samples were consumed.

Everything but the loader is numpy alone. The loader's names are resolved on first use, because it alone needs torch,
whose import would cost every preprocessing worker and `raytron preprocess` itself more than the rest together.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raytron.data.blend import BlendedDataset
from raytron.data.build import Prepared, build_datasets, prepare, unigram_entropy
from raytron.data.gpt import GPTDataset, Sample
from raytron.data.indexed import IndexedDataset, IndexedDatasetWriter
from raytron.data.mock import MockDocuments
from raytron.data.preprocess import PreprocessSummary, preprocess
from raytron.data.sft import Examples, PreparedExamples, SFTDataset, build_sft_datasets, prepare_examples
from raytron.data.stdlib import write_stdlib_corpus
from raytron.data.tokenizer import ByteTokenizer, HFTokenizer, NullTokenizer, Tokenizer, load_tokenizer, train_bpe
from raytron.data.word_problems import write_word_problems

if TYPE_CHECKING:
    from raytron.data.loader import GlobalBatches, MicroBatch, Prefetcher

__all__ = [
    "BlendedDataset",
    "ByteTokenizer",
    "Examples",
    "GPTDataset",
    "GlobalBatches",
    "HFTokenizer",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "MicroBatch",
    "MockDocuments",
    "NullTokenizer",
    "Prefetcher",
    "Prepared",
    "PreparedExamples",
    "PreprocessSummary",
    "SFTDataset",
    "Sample",
    "Tokenizer",
    "build_datasets",
    "build_sft_datasets",
    "load_tokenizer",
    "prepare",
    "prepare_examples",
    "preprocess",
    "train_bpe",
    "unigram_entropy",
    "write_stdlib_corpus",
    "write_word_problems",
]


def __getattr__(name: str) -> Any:
    if name in ("GlobalBatches", "MicroBatch", "Prefetcher"):
        return getattr(import_module("raytron.data.loader"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
