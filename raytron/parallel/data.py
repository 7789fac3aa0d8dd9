"""Data parallelism over one flat gradient buffer: bucketed reduction and ZeRO-1 (Rajbhandari et al. 2020).

The buffer is cut in equal buckets whatever the parameters' borders. With ZeRO every dp rank owns one interval of every
bucket, so a bucket's reduce-scatter and the all-gather of updated weights are contiguous, and the optimizer's shard is
just a list of flat intervals that `layout.cut` takes from the weights' layout. Cutting by parameter instead would need
a copy in and out, and eight times as many pieces.

A bucket's reduction starts as soon as every parameter in it has its whole gradient, overlapping the rest of the
backward; buckets start in one fixed order (the back of the buffer first), so that all ranks agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytron.parallel.collectives import Axis, Handle

__all__ = ["GradientReducer", "buckets", "shard_intervals"]

Interval = tuple[int, int]


def buckets(total: int, bucket_elements: int, quantum: int) -> list[Interval]:
    """Cut [0, total) in intervals of about `bucket_elements`, each a multiple of `quantum` (which divides total)."""
    assert total % quantum == 0, f"buffer of {total} elements is no multiple of {quantum}"
    length = max(quantum, -(-bucket_elements // quantum) * quantum)
    return [(start, min(start + length, total)) for start in range(0, total, length)]


def shard_intervals(cuts: Sequence[Interval], size: int, index: int) -> list[Interval]:
    """What position `index` of `size` owns: its share of every bucket."""
    shares = [((stop - start) // size, start) for start, stop in cuts]
    return [(start + index * share, start + (index + 1) * share) for share, start in shares]


class GradientReducer:
    """Sums a flat gradient buffer over the data-parallel axis.

    Args:
        grads: flat buffer, updated in place.
        spans: [start, stop) of every parameter in it.
        cuts: buckets, see `buckets`.
        axis: data-parallel line.
        scatter: leave each rank only its own interval of each bucket (ZeRO); the rest of the buffer is then undefined.
    """

    def __init__(self, grads: Tensor, spans: Sequence[Interval], cuts: Sequence[Interval], axis: Axis, scatter: bool):
        self._grads, self._cuts, self._axis, self._scatter = grads, cuts, axis, scatter
        self._touching = [
            [b for b, (start, stop) in enumerate(cuts) if start < span[1] and span[0] < stop] for span in spans
        ]
        self._params = [sum(b in touched for touched in self._touching) for b in range(len(cuts))]
        self.begin()

    def begin(self) -> None:
        """Forget the last step's reductions."""
        self._missing = list(self._params)
        self._done: set[int] = set()
        self._next = len(self._cuts) - 1
        self._handles: list[tuple[int, Handle, Tensor | None]] = []

    def ready(self, param: int) -> None:
        """Parameter number `param` has its whole gradient; start every bucket that now may."""
        if self._axis.size == 1 or param in self._done:
            return
        self._done.add(param)
        for bucket in self._touching[param]:
            self._missing[bucket] -= 1
        while self._next >= 0 and self._missing[self._next] == 0:
            self._start(self._next)
            self._next -= 1

    def _start(self, bucket: int) -> None:
        start, stop = self._cuts[bucket]
        grads = self._grads[start:stop]
        if self._scatter:
            handle, parts = self._axis.reduce_scatter_start(grads)
            self._handles.append((bucket, handle, parts))
        else:
            self._handles.append((bucket, self._axis.all_reduce_(grads, async_op=True), None))

    def finish(self) -> None:
        """Wait for every bucket. All parameters must be `ready`."""
        if self._axis.size == 1:
            return
        assert self._next < 0, f"bucket {self._next} still misses gradients of {self._missing[self._next]} parameters"
        mine = shard_intervals(self._cuts, self._axis.size, self._axis.index)
        for bucket, handle, parts in self._handles:
            handle.wait()
            if parts is not None:
                start, stop = mine[bucket]
                torch.sum(parts, 0, out=self._grads[start:stop])
        self._handles.clear()
