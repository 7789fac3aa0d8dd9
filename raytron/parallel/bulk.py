"""Transfers between memory and a shared directory, with checksums, all of them in one call of C (bulk.c).

What lies in whole, aligned 64-bit words on both sides is a job there: copied, compared and summed up row by row, by all
threads, with no Python between the tensors of a model. The rest (another dtype, a transpose, a GPU, an odd cut) goes
through torch and numpy, block by block, which gives the same and takes a few times as long.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raytron.parallel.boxes import Box
from raytron.parallel.checksum import as_words, word_weights
from raytron.parallel.compiled import load
from raytron.parallel.progress import Pace

__all__ = ["LATE", "TAKE", "WRITE", "WRITE_CHANGED", "Bulk", "Carried", "Transfer"]

WRITE, WRITE_CHANGED, TAKE = range(3)
DONE, GIVEN_UP, LATE = range(3)
_PART = np.dtype([("job", np.int64), ("row", np.int64), ("stop", np.int64), ("block", np.int64)])


class _Job(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("to", "source", "rows_weight", "words_weight")]
        + [(name, ctypes.c_int64) for name in ("words", "to_stride", "from_stride")]
        + [("sum", ctypes.c_uint64), ("differs", ctypes.c_int64)]
    )


@dataclass(frozen=True)
class Transfer:
    """A box of a tensor from `source` to `to`, views of its shape. summed: its checksum is wanted."""

    name: str
    box: Box
    shape: tuple[int, ...]
    to: Tensor
    source: Tensor
    summed: bool = True


class Carried(NamedTuple):
    """What `Bulk.run` did. sums: (name, checksum) of the transfers that are summed. different: names of the others
    whose two sides differ. status: not 0 if it stopped half-way: a push was given up, or came too late (`LATE`)."""

    sums: list[tuple[str, int]]
    different: list[str]
    status: int


@functools.cache
def _function() -> Callable[..., int] | None:
    library = load(Path(__file__).with_name("bulk.c"), "moving weights")
    if library is None:
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function = library.rt_carry_out
    function.argtypes = [pointer, number, pointer, number, pointer, number, ctypes.c_int, ctypes.c_int, pointer]
    function.restype = ctypes.c_int
    return function


class Bulk:
    """Transfers that are made again and again between the same places.

    Args:
        blocks: (name, box) -> (block, part of the box) of each block that the box meets.
        turns: int64, of all blocks.

    Attributes:
        rest: those that are the caller's to make, in the order of their first blocks, `starts`.
    """

    def __init__(
        self,
        transfers: Sequence[Transfer],
        blocks: Callable[[str, Box], Iterable[tuple[int, Box]]],
        turns: np.ndarray,
    ) -> None:
        self._turns, self._transfers, jobs, parts, self._kept = turns, [], [], [], []
        rest: list[tuple[int, Transfer]] = []
        for transfer in transfers:
            spans = list(blocks(transfer.name, transfer.box))
            views = _views(transfer, len(spans)) if _function() else None
            if views is None:
                rest.append((spans[0][0], transfer))
                continue
            self._transfers.append(transfer)
            parts += [(len(jobs), *rows, block) for block, rows in _rows(transfer, views[0].shape[0], spans)]
            jobs.append(self._job(transfer, *views))
        rest.sort(key=lambda pair: pair[0])
        self.starts, self.rest = [start for start, _ in rest], [transfer for _, transfer in rest]
        parts.sort(key=lambda part: part[-1])
        self._jobs, self._parts = (_Job * len(jobs))(*jobs), np.array(parts, dtype=_PART)

    def _job(self, transfer: Transfer, to: Tensor, source: Tensor) -> _Job:
        weights = [None, None]
        if transfer.summed:
            arrays = word_weights(transfer.box, transfer.shape, transfer.to.element_size())
            self._kept += arrays
            weights = [array.ctypes.data for array in arrays]
        return _Job(to.data_ptr(), source.data_ptr(), *weights, to.shape[1], to.stride(0), source.stride(0))

    def run(self, mode: int, turn: int, pace: Pace | None = None) -> Carried:
        """Make them all but the rest, in the order of their blocks.

        WRITE copies and marks blocks with `turn`, WRITE_CHANGED those only that differ; TAKE copies blocks that are
        marked later than `turn`, each once `pace` lets it. Sums are of what is there then.
        """
        parts, status = self._parts, DONE
        if self._transfers:
            status = _function()(
                ctypes.addressof(self._jobs),
                len(self._jobs),
                parts.ctypes.data,
                len(parts),
                self._turns.ctypes.data,
                turn,
                mode,
                torch.get_num_threads(),
                None if pace is None else ctypes.addressof(pace),
            )
        done = list(zip(self._transfers, self._jobs, strict=True))
        sums = [(transfer.name, job.sum) for transfer, job in done if transfer.summed]
        return Carried(sums, [transfer.name for transfer, job in done if job.differs], status)


def _views(transfer: Transfer, blocks: int) -> tuple[Tensor, Tensor] | None:
    """Both sides as [rows, words], where they are that and rows of one index of the first dimension stay together."""
    to, source = transfer.to, transfer.source
    if to.device.type != "cpu" or source.device.type != "cpu" or to.dtype != source.dtype or not transfer.box:
        return None
    if len(transfer.box) == 1 and blocks > 1:  # a single row, cut across
        return None
    views = tuple(as_words(side, transfer.box) for side in (to, source))
    return None if any(side is None for side in views) else views


def _rows(transfer: Transfer, rows: int, spans: Iterable[tuple[int, Box]]) -> Iterable[tuple[int, tuple[int, int]]]:
    """(block, first and last row) of each block."""
    if len(transfer.box) == 1:
        return [(block, (0, 1)) for block, _ in spans]
    start, stop = transfer.box[0]
    each = rows // (stop - start)
    return [(block, ((part[0][0] - start) * each, (part[0][1] - start) * each)) for block, part in spans]
