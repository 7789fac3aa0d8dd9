"""How far the writers of a shared directory are, so that its readers need not wait for the whole of a push.

    writer   block 0 | block 1 | block 2 | ...            | sums
    reader             block 0 | block 1 | ...  | block n | its own sums against the writers'

A file of 64-bit words. Each writer has one that only grows: the number of the push and how many blocks, in the file's
order, it is done with; a reader that wants a block waits until every writer is past it. One number a writer, and not a
mark a block, because writers share blocks (each has some columns of a tensor), so that no mark of one says that a block
is whole. When a writer is through it leaves the checksums of all that it wrote, and says so: what a reader then holds
is proved without a message to anybody.

Nobody waits for a reader. A reader waits asleep, as long as some writer moves; a push that is given up (a writer died)
is so marked by whoever notices, which releases the readers at once, and one that says nothing any more after a time.
The words are read and written in the machine's own order of memory where C does it; Python's stores have no more than
the processor's. Should one let an unfinished block through, the sums say so.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import time
from collections.abc import Sequence

import numpy as np

__all__ = ["Pace", "Progress", "WriterGone"]

PATIENCE_S = 120.0  # without any writer moving
POLL_S = 1e-4
_LINE = 8  # words: writers on different cores do not share a cache line


class WriterGone(RuntimeError):  # noqa: N818
    """A push ended before all of it was written; says which and why."""


class Pace(ctypes.Structure):
    """What bulk.c is told of one side of a push; see there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("reached", "given_up")),
        *((name, ctypes.c_int64) for name in ("turn", "begin", "limit", "writers", "patience_ns")),
    )


class Progress:
    """The file, mapped.

    Args:
        memory: of the file, which `size` says the length of.
        names: of the directory's tensors. blocks: of all of them together.

    Attributes:
        writers: how many write; 0 where nobody says how far it is, and readers come when all is done.
    """

    def __init__(self, memory: mmap.mmap, names: Sequence[str], blocks: int) -> None:
        words = np.frombuffer(memory, dtype=np.int64)
        self._names, self.blocks = list(names), blocks
        self.writers = (len(words) - _LINE) // (_LINE + _row(len(self._names)))
        self._given_up, self._reached, sums = np.split(words, [_LINE, _LINE * (1 + self.writers)])
        self._sums = sums.view(np.uint64).reshape(self.writers, _row(len(self._names)))[:, : len(self._names)]

    @staticmethod
    def size(writers: int, tensors: int) -> int:
        """Bytes of the file."""
        return 8 * (_LINE + writers * (_LINE + _row(tensors)))

    def _value(self, turn: int, blocks: int) -> int:
        return turn * (self.blocks + 2) + blocks

    # The writers

    def begin(self, writer: int) -> None:
        """Forget what another writer in this one's place has left."""
        self._sums[writer] = 0

    def reach(self, writer: int, turn: int, blocks: int) -> None:
        """The writer is done with so many blocks of a push."""
        word = self._reached[_LINE * writer : _LINE * writer + 1]
        word[0] = max(int(word[0]), self._value(turn, blocks))

    def seal(self, writer: int, turn: int, sums: dict[str, int]) -> None:
        """It is through. sums: of the tensors that it wrote some of in this push, of that part."""
        for k, name in enumerate(self._names):
            if name in sums:
                self._sums[writer, k] = sums[name]
        self.reach(writer, turn, self.blocks + 1)

    def give_up(self, turn: int) -> None:
        """Release the readers of a push that will not be finished."""
        self._given_up[0] = max(int(self._given_up[0]), turn)

    def writing(self, writer: int, turn: int, limit: int) -> Pace:
        """For a writer; no block from `limit` on is reported."""
        reached = self._reached[_LINE * writer :]
        return Pace(reached.ctypes.data, self._given_up.ctypes.data, turn, self._value(turn, 0), limit)

    # The readers

    def taking(self, turn: int) -> Pace:
        """For a reader."""
        words = self._reached.ctypes.data, self._given_up.ctypes.data
        return Pace(*words, turn, self._value(turn, 0), 0, self.writers, math.ceil(1e9 * PATIENCE_S))

    def wait(self, turn: int, blocks: int) -> None:
        """Until every writer is done with so many blocks of a push.

        Raises:
            WriterGone: the push was given up, or no writer moves any more.
        """
        wanted, seen, since = self._value(turn, blocks), None, 0.0
        while (reached := self._reached[::_LINE].tolist()) and min(reached) < wanted:
            if self._given_up[0] >= turn:
                raise self.gone(turn, late=False)
            if reached != seen:
                seen, since = reached, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                raise self.gone(turn, late=True)
            time.sleep(POLL_S)

    def gone(self, turn: int, late: bool) -> WriterGone:
        """What to raise. late: nobody has said so, but nothing moves."""
        done = min(self._reached[::_LINE].tolist()) - self._value(turn, 0)
        where = f"with {min(max(done, 0), self.blocks)} of {self.blocks} blocks written"
        if late:
            return WriterGone(f"push {turn} has not moved for {PATIENCE_S:g} s, {where}: a rank of the trainer hangs")
        return WriterGone(f"push {turn} was given up {where}: a rank of the trainer failed")

    def sums(self, turn: int) -> dict[str, int]:
        """Canonical name -> checksum of what was written, by all writers, once all are through. Raises as `wait`."""
        self.wait(turn, self.blocks + 1)
        return dict(zip(self._names, self._sums.sum(axis=0, dtype=np.uint64).tolist(), strict=True))


def _row(tensors: int) -> int:
    """Words of a writer's sums."""
    return -(-tensors // _LINE) * _LINE
