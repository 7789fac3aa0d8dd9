"""A checksum of canonical tensors that does not depend on how they are cut, ordered or replicated.

    sum over elements of bits(element) * 2^(shift of its column) * odd(row) * odd(column's word)   modulo 2^64

The row is the canonical index over all dimensions but the last, a word is the 64 bits of neighbouring columns. So a
piece's sum is an integer matrix-vector product over 64-bit words, read at memory speed; sums of disjoint pieces add up
(any owner of any cut may contribute), and the sum is linear in the bits, so a delta updates it. Odd weights are units
modulo 2^64: a single changed word always changes the sum. Whole-buffer hashes (xxh3) are faster still and say nothing
once two layouts cut a tensor differently; the elementwise form of this sum is a hundred times slower.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from raytron.parallel.boxes import Box, whole
from raytron.parallel.pieces import Layout
from raytron.parallel.storage import Buffers, as_integers, copy_, view

_MODULUS = 1 << 64
_BLOCK = 1 << 23  # bytes copied at once where words must be assembled: bounds the extra memory
_ROW, _COLUMN = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # seeds: rows and columns must not share weights


def checksum(tensor: torch.Tensor, box: Box | None = None, shape: Sequence[int] | None = None) -> int:
    """The sum of a part of a canonical tensor, in [0, 2^64).

    tensor: the values of `box` (any strides, dtype and device), of shape hi - lo per dimension.
    box: its canonical coordinates (default: `tensor` is the whole). shape: the canonical shape (needed with a box).
    """
    shape = tuple(tensor.shape if shape is None else shape)
    box = whole(shape) if box is None else box
    if tuple(tensor.shape) != tuple(hi - lo for lo, hi in box) or len(shape) != len(box):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not the box {box} of shape {shape}")
    bits = as_integers(tensor)
    if not shape:
        bits, box, shape = bits.unsqueeze(0), ((0, 1),), (1,)
    return _sum(bits, box, shape) % _MODULUS if bits.numel() else 0


def checksums(layout: Layout, buffers: Buffers) -> dict[str, int]:
    """Per tensor, the sum of all pieces that the given buffers' places hold.

    Over `owners(layout)`, each element counts once: then the sums of all ranks, added with `combine`, are those of the
    canonical tensors whatever the layout. Tensors of which nothing is held here are left out.
    """
    out: dict[str, int] = {}
    for name, piece in layout:
        for place in piece.places:
            flat = buffers.get((place, piece.buffer))
            if flat is not None:
                part = checksum(view(flat, piece.box, piece.spot()), piece.box, layout.tensors[name].shape)
                out[name] = (out.get(name, 0) + part) % _MODULUS
    return out


def combine(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of tensors whose disjoint pieces were summed apart (by several ranks)."""
    out: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            out[name] = (out.get(name, 0) + value) % _MODULUS
    return out


def as_words(tensor: torch.Tensor, box: Box) -> torch.Tensor | None:
    """A view int64 [rows, words] of the values of a box, whose rows are whole words of the canonical tensor; else None.

    Rows are the indices of all dimensions but the last, evenly spaced.
    """
    bits = as_integers(tensor)
    words = _words(bits, box[-1]) if bits.numel() else None
    return None if words is None else words.view(torch.int64)


def word_weights(box: Box, shape: Sequence[int], itemsize: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64 weights of the rows, and of the words of a row, of `as_words(tensor, box)`: the checksum is the sum of
    word x row's weight x word's weight modulo 2^64."""
    per_word = 8 // itemsize
    first, last = box[-1]
    return _row_weights(box[:-1], shape[:-1]), _weights(_COLUMN, first // per_word, -(-last // per_word))


def fold(sums: Mapping[str, int]) -> int:
    """One number, in [0, 2^64), for the checksums of all tensors of a model."""
    text = "".join(f"{name}={value:016x};" for name, value in sorted(sums.items()))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _sum(bits: torch.Tensor, box: Box, shape: Sequence[int]) -> int:
    """Word by word where memory allows it, otherwise in blocks that are copied to whole, aligned words."""
    words = _words(bits, box[-1])
    if words is None and (bits.numel() * bits.element_size() > _BLOCK or bits.dim() > 2) and bits.dim() > 1:
        if bits.shape[0] > 1:
            rows = max(1, min(_BLOCK * bits.shape[0] // (bits.numel() * bits.element_size()), bits.shape[0] - 1))
            lo, hi = box[0]
            parts = ((at, min(at + rows, hi)) for at in range(lo, hi, rows))
            return sum(_sum(bits[a - lo : b - lo], ((a, b), *box[1:]), shape) for a, b in parts)
        if bits.dim() > 2:  # one index of the leading dimension: fold it into the row number of the next
            first, (lo, hi) = box[0][0] * shape[1], box[1]
            return _sum(bits[0], ((first + lo, first + hi), *box[2:]), (shape[0] * shape[1], *shape[2:]))
    if words is None:
        words = _assemble(bits, box[-1])
    return _dot(words, *word_weights(box, shape, bits.element_size()))


def _words(bits: torch.Tensor, columns: tuple[int, int]) -> torch.Tensor | None:
    """A view [rows, words] of int64, None where the piece is not whole, aligned words in evenly spaced rows."""
    size = bits.element_size()
    per_word = 8 // size
    if columns[0] % per_word or columns[1] % per_word or bits.stride(-1) != 1 or bits.data_ptr() % 8:
        return None
    if any(n > 1 and s % per_word for n, s in zip(bits.shape[:-1], bits.stride()[:-1], strict=True)):
        return None
    leading = [(n, s) for n, s in zip(bits.shape[:-1], bits.stride()[:-1], strict=True) if n > 1]
    if any(a[1] != b[0] * b[1] for a, b in pairwise(leading)):
        return None
    rows, stride = math.prod(bits.shape[:-1]), leading[-1][1] if leading else bits.shape[-1]
    # as_strided after the change of dtype: offsets and strides are whole words, as tested above
    flat = torch.as_strided(bits, (rows, bits.shape[-1]), (stride, 1), bits.storage_offset())
    return flat if size == 8 else flat.view(torch.int64)


def _assemble(bits: torch.Tensor, columns: tuple[int, int]) -> torch.Tensor:
    """[rows, words]: a copy on whole words, zero (which adds nothing) where a word reaches outside the piece."""
    per_word = 8 // bits.element_size()
    first, last = columns[0] // per_word, -(-columns[1] // per_word)
    rows = math.prod(bits.shape[:-1])
    scratch = bits.new_zeros((rows, (last - first) * per_word))
    inside = scratch[:, columns[0] - first * per_word :][:, : bits.shape[-1]]
    copy_(inside, bits.reshape(rows, bits.shape[-1]))
    return scratch.view(torch.int64)


def _dot(words: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> int:
    """sum of words[i, j] * rows[i] * columns[j], modulo 2^64 (either sign)."""
    if words.device.type != "cpu":
        return _dot_torch(words, rows, columns)
    # numpy's einsum is the fastest 64-bit integer product on a CPU: half as fast again as torch's mv
    sums = np.einsum("ij,j->i", words.numpy().view(np.uint64), columns)
    return int((sums * rows).sum(dtype=np.uint64))


def _dot_torch(words: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> int:
    """The same on any device, in blocks: CUDA has no integer matrix product."""
    by_row, by_column = (torch.from_numpy(w.view(np.int64).copy()).to(words.device) for w in (rows, columns))
    step = max(1, _BLOCK // (8 * words.shape[1]))
    sums = torch.cat([(block * by_column).sum(dim=1) for block in words.split(step)])
    return int((sums * by_row).sum())


def _row_weights(box: Box, shape: Sequence[int]) -> np.ndarray:
    if len(box) == 1:
        return _weights(_ROW, *box[0])
    index = np.zeros(1, dtype=np.uint64)
    for (lo, hi), n in zip(box, shape, strict=True):
        index = (index[:, None] * np.uint64(n) + np.arange(lo, hi, dtype=np.uint64)).reshape(-1)
    return _odd(_ROW, index)


@lru_cache(maxsize=32)
def _weights(seed: int, start: int, stop: int) -> np.ndarray:
    weights = _odd(seed, np.arange(start, stop, dtype=np.uint64))
    weights.flags.writeable = False
    return weights


def _odd(seed: int, index: np.ndarray) -> np.ndarray:
    """Odd 64-bit weights of indices: splitmix64, whose bits are independent enough that swaps and shifts show."""
    x = index * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
