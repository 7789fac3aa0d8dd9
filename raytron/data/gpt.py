"""GPT samples out of an indexed dataset: Megatron's document, sample and shuffle indices, number for number.

The documents of a split are shuffled and laid end to end, once per epoch; sample k is the `sequence_length` + 1 tokens
from token k * sequence_length of that stream (so neighbours share one token, and every token is predicted once); a last
shuffle gives the order of the samples. One `RandomState(seed)` drives it all, in Megatron-core's order
(``gpt_dataset.py``, ``helpers.cpp``).

Megatron walks the documents in C++ to find where each sample starts. The start is a function of the cumulative lengths,
so one `searchsorted` gives the same rows here, without a compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class Documents(Protocol):
    """What a GPT dataset reads: `IndexedDataset` or `MockDocuments`."""

    sequence_lengths: np.ndarray

    @property
    def identity(self) -> dict[str, object]: ...

    def __len__(self) -> int: ...

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray: ...


class Sample(NamedTuple):
    """One training sample of S tokens."""

    tokens_S: np.ndarray  # int64
    labels_S: np.ndarray  # int64, the next token of each
    loss_mask_S: np.ndarray  # float32, 0 where the label must not count
    position_ids_S: np.ndarray  # int64
    document_ids_S: np.ndarray  # int32, 0 upwards: which of the sample's documents a token belongs to


class Indices(NamedTuple):
    """document (documents * epochs,) int32; sample (n + 1, 2) int32 or int64: row k is where sample k starts, as
    (place in `document`, token offset); shuffle (n,) uint32 or int64."""

    document: np.ndarray
    sample: np.ndarray
    shuffle: np.ndarray


def build_indices(
    lengths: np.ndarray,
    documents: np.ndarray,
    num_samples: int | None,
    sequence_length: int,
    seed: int,
    *,
    drop_last_partial: bool = True,
) -> Indices:
    """Indices for at least `num_samples` samples (None: one epoch) of the `documents` (int32 ids into `lengths`)."""
    epoch = int(lengths[documents].sum(dtype=np.int64))
    asked = num_samples or 0
    epochs = max(1, -(-(asked * sequence_length + 1) // epoch))
    before_last = ((epochs - 1) * epoch - 1) // sequence_length  # samples that end before the last epoch begins
    separate = epochs > 1 and asked - before_last < int(0.80 * ((epoch - 1) // sequence_length))
    rng = np.random.RandomState(seed)
    document = _document_index(documents, epochs, rng, separate)
    sample = _sample_index(lengths, document, sequence_length, drop_last_partial)
    total = len(sample) - 1
    shuffle = _shuffle_index(before_last if separate else total, total, rng)
    return Indices(document, sample, shuffle)


def _document_index(documents: np.ndarray, epochs: int, rng: np.random.RandomState, separate: bool) -> np.ndarray:
    if separate:  # the last epoch is used so little that mixing it in would favour some documents
        head = _document_index(documents, epochs - 1, rng, False)
        return np.concatenate([head, _document_index(documents, 1, rng, False)])
    index = np.tile(documents.astype(np.int32), epochs)
    rng.shuffle(index)
    return index


def _sample_index(lengths: np.ndarray, document: np.ndarray, sequence_length: int, drop_last: bool) -> np.ndarray:
    sizes = lengths[document].astype(np.int64)
    ends = np.cumsum(sizes)
    tokens = int(ends[-1])
    if drop_last:
        count = (tokens - 1) // sequence_length
    else:
        # float32 as Megatron computes it, so that lengths agree on very long splits too
        count = int(np.ceil(np.float32(tokens - 1) / np.float32(sequence_length)))
    starts = np.arange(count + 1, dtype=np.int64) * sequence_length
    inside = starts < tokens
    place = np.searchsorted(ends, np.minimum(starts, tokens - 1), side="right")
    offset = np.where(inside, starts - (ends - sizes)[place], 0)
    place[0], offset[0] = 0, 0  # even where the first documents are empty
    if not inside.all():  # the end of a partial sample: the last token of the last document
        place[~inside], offset[~inside] = len(document) - 1, sizes[-1] - 1
    wide = max(len(document), int(lengths.max())) > np.iinfo(np.int32).max
    return np.stack([place, offset], axis=1).astype(np.int64 if wide else np.int32)


def _shuffle_index(first: int, total: int, rng: np.random.RandomState) -> np.ndarray:
    dtype = np.int64 if total >= np.iinfo(np.uint32).max - 1 else np.uint32
    head = np.arange(first, dtype=dtype)
    rng.shuffle(head)
    if first == total:
        return head
    tail = np.arange(first, total, dtype=dtype)
    rng.shuffle(tail)
    return np.concatenate([head, tail])


class GPTDataset:
    """Samples of one split of one source, a pure function of their index.

    `documents` is the split's part of `source`; `num_samples` None means one epoch. `pad` None pads with -1
    inside (only the last sample of a split that keeps its partial sample is ever padded); padded labels carry no loss.
    With `document_mask`, and with `reset_position_ids`, positions start again at every document; a document starts
    where a sequence of the source does and after every `eod`. With `eod_mask_loss` the token after an `eod`, which
    can't be predicted from it, carries no loss.

    With `cache_path` the indices are kept as .npy files named by the md5 of what they are a function of, and mapped;
    ranks that build the same file at once each rename a whole one into place. `name` is what errors call the source.

    Raises ValueError where the split can't fill one sample, IndexError for a sample beyond its end.
    """

    def __init__(
        self,
        source: Documents,
        documents: range,
        num_samples: int | None,
        *,
        sequence_length: int,
        seed: int,
        eod: int,
        pad: int | None = None,
        split: str = "train",
        document_mask: bool = False,
        reset_position_ids: bool = False,
        eod_mask_loss: bool = False,
        drop_last_partial: bool = True,
        cache_path: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        self.source = source
        self.documents = documents
        self.sequence_length = sequence_length
        self.eod = eod
        self.pad = -1 if pad is None or pad == eod else pad
        self.split = split
        self.document_mask = document_mask
        self.restart_positions = document_mask or reset_position_ids
        self._eod_mask_loss = eod_mask_loss
        lengths = source.sequence_lengths
        tokens = int(lengths[documents.start : documents.stop].sum(dtype=np.int64))
        if tokens < 2 or (num_samples is None and drop_last_partial and tokens <= sequence_length):
            name = name or source.identity.get("path", "mock data")
            raise ValueError(
                f"the {split} split of {name} holds {tokens} tokens, fewer than one sample of sequence_length"
                f" {sequence_length} + 1; give it more text, a larger share in data.split, or a shorter"
                " data.sequence_length"
            )
        self.description: dict[str, object] = {
            "class": "GPTDataset",
            "source": source.identity,
            "documents": [documents.start, documents.stop],
            "num_samples": num_samples,
            "split": split,
            "seed": seed,
            "sequence_length": sequence_length,
            "drop_last_partial": drop_last_partial,
        }
        arrays = cached_arrays(
            cache_path,
            self.description,
            f"GPTDataset-{split}",
            ("document_index", "sample_index", "shuffle_index"),
            lambda: build_indices(
                lengths,
                np.arange(documents.start, documents.stop, dtype=np.int32),
                num_samples,
                sequence_length,
                seed,
                drop_last_partial=drop_last_partial,
            ),
        )
        self.indices = Indices(*arrays)

    def __len__(self) -> int:
        """Samples that can be read: at least `num_samples`."""
        return len(self.indices.sample) - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a {self.split} split of {len(self)}; build it with more samples")
        parts = self._parts(int(self.indices.shuffle[index]))
        lengths = [len(part) for part in parts]
        text = np.full(self.sequence_length + 1, self.pad, np.int64)
        text[: sum(lengths)] = np.concatenate(parts)
        starts = np.zeros(self.sequence_length + 1, bool)
        starts[np.cumsum([0, *lengths[:-1]])] = True
        return self._sample(text, starts)

    def _parts(self, k: int) -> list[np.ndarray]:
        """The tokens of sample `k` of the unshuffled order, one array per document that it touches."""
        (first, offset), (last, end) = self.indices.sample[k].tolist(), self.indices.sample[k + 1].tolist()
        ids = self.indices.document[first : last + 1].tolist()
        if first == last:
            return [self.source.get(ids[0], offset, end - offset + 1)]
        head, tail = self.source.get(ids[0], offset), self.source.get(ids[-1], 0, end + 1)
        return [head, *(self.source.get(i) for i in ids[1:-1]), tail]

    def _sample(self, text: np.ndarray, starts: np.ndarray) -> Sample:
        """`text` (S + 1 ids, padded) and where documents start in it, as a sample."""
        tokens_S, labels_S = text[:-1].copy(), text[1:].copy()
        ends_S = tokens_S == self.eod
        starts_S = starts[:-1].copy()
        starts_S[1:] |= ends_S[:-1]
        starts_S[0] = True
        position_ids_S = np.arange(self.sequence_length, dtype=np.int64)
        if self.restart_positions:
            position_ids_S -= np.maximum.accumulate(np.where(starts_S, position_ids_S, 0))
        loss_mask_S = (labels_S != self.pad).astype(np.float32)
        if self._eod_mask_loss:
            loss_mask_S[ends_S] = 0.0
        tokens_S[tokens_S == self.pad] = 0
        labels_S[labels_S == self.pad] = 0
        return Sample(tokens_S, labels_S, loss_mask_S, position_ids_S, np.cumsum(starts_S, dtype=np.int32) - 1)

    def token_counts(self, minlength: int = 0) -> np.ndarray:
        """How often each id occurs in one epoch of the split (int64, at least `minlength` long)."""
        counts = np.zeros(minlength, np.int64)
        for chunk in self._chunks():
            seen = np.bincount(chunk, minlength=len(counts))
            seen[: len(counts)] += counts
            counts = seen
        return counts

    def _chunks(self, tokens: int = 1 << 20) -> Iterator[np.ndarray]:
        """All tokens of the split, some documents at a time."""
        pending: list[np.ndarray] = []
        held = 0
        for index in self.documents:
            pending.append(self.source.get(index))
            held += len(pending[-1])
            if held >= tokens:
                yield np.concatenate(pending)
                pending, held = [], 0
        if pending:
            yield np.concatenate(pending)


def cached_arrays(
    cache_path: str | os.PathLike[str] | None,
    description: dict[str, Any],
    label: str,
    names: tuple[str, ...],
    build: Callable[[], tuple[np.ndarray, ...]],
) -> tuple[np.ndarray, ...]:
    """The arrays of `build()`, kept under `cache_path` as ``{md5}-{label}-{name}.npy`` (Megatron's naming).

    The description is written last: where it lies, the arrays are whole. None: built, and not kept.
    """
    if cache_path is None:
        return build()
    text = json.dumps(description, indent=4)
    key = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    paths = [Path(cache_path) / f"{key}-{label}-{name}.npy" for name in names]
    marker = Path(cache_path) / f"{key}-{label}-description.txt"
    if not (marker.is_file() and all(path.is_file() for path in paths)):
        marker.parent.mkdir(parents=True, exist_ok=True)
        for path, array in zip(paths, build(), strict=True):
            write_whole(path, lambda file, array=array: np.save(file, array))
        write_whole(marker, lambda file: file.write(text.encode()))
    return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)


def write_whole(path: Path, write: Callable[[Any], object]) -> None:
    """Write through a temporary name of this writer's own, so that readers and other writers see whole files."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
