"""Megatron's indexed dataset: tokens in ``{prefix}.bin``, where each sequence lies in ``{prefix}.idx``.

The format is kept byte for byte (MMIDIDX version 1, Megatron-core ``indexed_dataset.py``), so corpora that were
tokenized for Megatron are read in place and ours are read by Megatron. A format of our own (Arrow, safetensors) would
have been self-describing, but would cut users off from the data they already have.

    .idx, little-endian, packed     .bin
      9  magic "MMIDIDX\\0\\0"          the tokens of all sequences, one after the other,
      8  uint64 version = 1            no header
      1  uint8 dtype code
      8  uint64 S sequences
      8  uint64 D = documents + 1
    4*S  int32 length of each sequence, in tokens
    8*S  int64 where it begins in the .bin, in bytes
    8*D  int64 first sequence of each document, then S
      S  int8 modes (multimodal files only; the header doesn't say so)

The header is 34 bytes, so the int64 arrays lie 2 bytes off their alignment; `numpy.frombuffer` reads them as they are.
"""

from __future__ import annotations

import os
import shutil
import struct
import uuid
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron stores tokens of such a vocabulary in: uint16 below 65,500 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def dataset_prefix(path: str | os.PathLike[str]) -> str | None:
    """The prefix of a ``.bin/.idx`` pair that `path` names (bare, or with either suffix); None where it names none."""
    text = os.fspath(path)
    prefix = text[:-4] if text.endswith((".bin", ".idx")) else text
    present = [os.path.isfile(prefix + suffix) for suffix in (".idx", ".bin")]
    if text == prefix and (not any(present) or (not all(present) and os.path.exists(text))):
        return None
    for suffix, there in zip((".idx", ".bin"), present, strict=True):
        if not there:
            raise ValueError(
                f"{prefix}{suffix} is missing: an indexed dataset is the pair .bin and .idx; copy both, or run"
                " `raytron preprocess` again"
            )
    return prefix


class IndexedDataset:
    """Read-only view of ``{prefix}.bin/.idx``; both are mapped, so opening is cheap and ranks of a node share pages.

    Attributes: `dtype` as the header says (never derived from a vocabulary); `sequence_lengths` (S, int32, tokens);
    `sequence_pointers` (S, int64, bytes); `document_indices` (D, int64); `tokens` (all tokens in storage order).

    Raises ValueError, naming the file and the mend, for a missing, foreign, truncated or mismatched pair.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        resolved = dataset_prefix(prefix)
        if resolved is None:
            raise ValueError(f"{os.fspath(prefix)}.idx is missing: no indexed dataset has this prefix")
        self.prefix = resolved
        self._read_index(Path(resolved + ".idx"))
        self._map_tokens(Path(resolved + ".bin"))

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return IndexedDataset, (self.prefix,)

    def _read_index(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
        if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
            raise ValueError(
                f"{path}: wrong magic {head[: len(MAGIC)]!r}, expected {MAGIC!r}: this isn't an indexed dataset; make"
                " one with `raytron preprocess`"
            )
        if len(head) < _HEADER.size:
            raise _truncated(path, size, _HEADER.size)
        _, version, code, n_sequences, n_documents = _HEADER.unpack(head)
        if version != 1:
            raise ValueError(f"{path}: version {version} of the format, only 1 is known; write it again for version 1")
        if code not in _DTYPES or _DTYPES[code].kind == "f":
            raise ValueError(f"{path}: dtype code {code} isn't one of token ids (1-5 and 8); preprocess the text again")
        self.dtype = _DTYPES[code]
        expected = _HEADER.size + 12 * n_sequences + 8 * n_documents
        if size < expected:
            raise _truncated(path, size, expected)
        if size not in (expected, expected + n_sequences):  # the longer form carries multimodal modes, which we skip
            raise ValueError(f"{path}: {size} bytes where its header promises {expected}; preprocess the text again")
        raw = np.memmap(path, mode="r")
        offset = _HEADER.size
        self.sequence_lengths = np.frombuffer(raw, np.int32, n_sequences, offset)
        self.sequence_pointers = np.frombuffer(raw, np.int64, n_sequences, offset + 4 * n_sequences)
        self.document_indices = np.frombuffer(raw, np.int64, n_documents, offset + 12 * n_sequences)
        if n_documents == 0 or self.document_indices[0] != 0 or self.document_indices[-1] != n_sequences:
            raise ValueError(
                f"{path}: documents don't span its {n_sequences} sequences: the index is damaged; preprocess the"
                " text again"
            )

    def _map_tokens(self, path: Path) -> None:
        size = path.stat().st_size
        if len(self.sequence_lengths):
            # Sequences are written in order, so the last one ends the file; larger files are subsets of a longer one.
            end = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
            if size < end:
                raise _truncated(path, size, end)
        self.tokens = (
            np.memmap(path, dtype=self.dtype, mode="r", shape=(size // self.dtype.itemsize,))
            if size >= self.dtype.itemsize
            else np.empty(0, self.dtype)
        )

    def __len__(self) -> int:
        """Sequences, which is what GPT data treats as documents."""
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens (default: the rest) of sequence `index` from token `offset`; a read-only view."""
        rest = int(self.sequence_lengths[index]) - offset
        length = rest if length is None else length
        if offset < 0 or not 0 <= length <= rest:
            raise IndexError(f"{self.prefix}: tokens {offset}..{offset + length} of sequence {index} aren't there")
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize + offset
        return self.tokens[start : start + length]

    @property
    def identity(self) -> dict[str, object]:
        """What tells this dataset from others in the key of an index cache."""
        stat = os.stat(self.prefix + ".idx")
        return {
            "path": os.path.abspath(self.prefix),
            "sequences": len(self),
            "bytes": os.path.getsize(self.prefix + ".bin"),
            "modified": stat.st_mtime_ns,
        }


def _truncated(path: Path, size: int, expected: int) -> ValueError:
    return ValueError(
        f"{path} is truncated: {size} bytes of {expected}; copy it again, or run `raytron preprocess` again"
    )


class IndexedDatasetWriter:
    """Writes a ``.bin/.idx`` pair, byte-identical to Megatron's builder for the same sequence of calls.

    Used as a context manager: both files grow under temporary names in the same folder and are renamed on a clean exit,
    the index last, so that a pair which has an index is whole. An exception (Ctrl-C included) leaves nothing behind.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES or self.dtype.kind == "f":
            raise ValueError(f"dtype {self.dtype} can't hold token ids in an indexed dataset; use uint16 or int32")
        folder, name = os.path.split(self.prefix)
        os.makedirs(folder or ".", exist_ok=True)
        self._partial = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:12]}")
        self._bin = open(self._partial + ".bin", "wb")  # noqa: SIM115  closed by __exit__
        self._lengths = array("i")
        self._documents = array("q", [0])
        assert self._lengths.itemsize == 4
        assert self._documents.itemsize == 8

    def add_item(self, tokens: np.ndarray | list[int]) -> None:
        """One more sequence of the open document. Raises ValueError where an id doesn't fit the dtype."""
        ids = np.asarray(tokens)
        limits = np.iinfo(self.dtype)
        if ids.size and (ids.min() < limits.min or ids.max() > limits.max):
            raise ValueError(f"token ids {ids.min()}..{ids.max()} don't fit {self.dtype}; state the true vocabulary")
        self._bin.write(ids.astype(self.dtype).tobytes())
        self._lengths.append(ids.size)

    def end_document(self) -> None:
        self._documents.append(len(self._lengths))

    def add_document(self, tokens: np.ndarray | list[int], lengths: list[int] | None = None) -> None:
        """A whole document; `lengths` cuts it into sequences (default: one)."""
        ids = np.asarray(tokens)
        lengths = [ids.size] if lengths is None else lengths
        if sum(lengths) != ids.size:
            raise ValueError(f"sequence lengths add up to {sum(lengths)}, the document holds {ids.size} tokens")
        start = 0
        for length in lengths:
            self.add_item(ids[start : start + length])
            start += length
        self.end_document()

    def merge(self, prefix: str | os.PathLike[str]) -> None:
        """Append another pair of the same dtype, as a byte copy."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise ValueError(f"{other.prefix} holds {other.dtype}, {self.prefix} {self.dtype}: preprocess both alike")
        before = len(self._lengths)
        self._lengths.frombytes(other.sequence_lengths.tobytes())
        self._documents.frombytes((other.document_indices[1:] + before).tobytes())
        with open(other.prefix + ".bin", "rb") as source:
            shutil.copyfileobj(source, self._bin, 1 << 20)

    def _write_index(self, path: str) -> None:
        lengths = np.frombuffer(self._lengths, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        with open(path, "wb") as file:
            file.write(_HEADER.pack(MAGIC, 1, _CODES[self.dtype], len(lengths), len(self._documents)))
            file.write(lengths.tobytes())
            file.write(pointers.tobytes())
            file.write(self._documents.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._bin.close()
            if kind is None:
                self._write_index(self._partial + ".idx")
                # The old index goes first: a crash in between must not pair it with the new tokens.
                Path(self.prefix + ".idx").unlink(missing_ok=True)
                os.replace(self._partial + ".bin", self.prefix + ".bin")
                os.replace(self._partial + ".idx", self.prefix + ".idx")
        finally:
            for suffix in (".bin", ".idx"):
                Path(self._partial + suffix).unlink(missing_ok=True)
