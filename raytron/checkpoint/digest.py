"""Checksums of files, computed on the bytes' way in or out, and the memory bytes are staged in.

xxh3 (Collet) of a file's bytes in order. What is written is hashed on a thread of its own, so that hashing overlaps the
disk. What is read is hashed by the reader itself, chunk by chunk while a chunk is still in its core's cache: from there
hashing costs a third of the copy that brought it, and handing chunks to another core costs more than that. A second
pass over a file, or a cryptographic hash, would each halve the speed of a load, and what is guarded against is damage,
not forgery.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import xxhash

__all__ = ["CHUNK", "Digest", "Entry", "Scratch", "digest_of"]

CHUNK = 4 << 20  # bytes written at a time: long enough to release the interpreter, short enough to overlap
_SMALL = 128 << 10  # below this handing over costs more than hashing


class Entry(NamedTuple):
    """What a manifest says of a file."""

    nbytes: int
    xxh3: str  # 16 hexadecimal digits


class Digest:
    """The running digest of bytes given in order, computed by `update` itself, or by the one worker of `pool`."""

    def __init__(self, pool: ThreadPoolExecutor | None = None) -> None:
        self._hash, self._pool, self.nbytes = xxhash.xxh3_64(), pool, 0
        self._last: Future | None = None

    def update(self, view: memoryview) -> None:
        """Add bytes; with a pool they must not change before `settle`."""
        self.nbytes += len(view)
        if self._pool is None or (len(view) < _SMALL and (self._last is None or self._last.done())):
            self._hash.update(view)
        else:
            self._last = self._pool.submit(self._hash.update, view)

    def settle(self) -> None:
        """Wait until all bytes given so far are hashed."""
        if self._last is not None:
            self._last.result()

    def entry(self) -> Entry:
        self.settle()
        return Entry(self.nbytes, self._hash.hexdigest())


def digest_of(data: bytes) -> Entry:
    """The entry of a file that holds `data`."""
    return Entry(len(data), xxhash.xxh3_64_hexdigest(data))


class Scratch:
    """Memory for what is staged between a file and its place, kept from one use to the next."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8; what was taken before is overwritten."""
        if self._bytes.numel() < nbytes:
            device = self._bytes.device
            del self._bytes  # the old goes first
            self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self._bytes[:nbytes]
