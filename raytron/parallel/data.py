"""Data parallelism over one flat gradient buffer: bucketed reduction and ZeRO-1 (Rajbhandari et al. 2020).

The buffer is cut in equal buckets whatever the parameters' borders. With ZeRO every dp rank owns one interval of every
bucket, so a bucket's reduce-scatter and the all-gather of updated weights are contiguous, and the optimizer's shard is
just a list of flat intervals that `layout.cut` takes from the weights' layout. Cutting by parameter instead would need
a copy in and out, and eight times as many pieces.

A bucket's reduction starts as soon as every parameter in it has its whole gradient, overlapping the rest of the
backward; buckets start in one fixed order (the back of the buffer first), so that all ranks agree on it.

With twins a bucket's owner sends the sums on to the rank that mirrors its shard, as soon as it has them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from raytron.parallel.collectives import Axis, Handle

__all__ = ["GradientReducer", "Interval", "buckets", "held_intervals", "shard_intervals", "twin_position"]

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


def twin_position(index: int, size: int, back: bool = False) -> int:
    """The position that mirrors the shard of `index`; `back`: the one whose shard `index` mirrors."""
    return (index - size // 2 if back else index + size // 2) % size


def held_intervals(cuts: Sequence[Interval], size: int, index: int, twins: bool) -> list[Interval]:
    """What position `index` updates: its own share of every bucket, then with `twins` that of the one it mirrors."""
    own = shard_intervals(cuts, size, index)
    return own + shard_intervals(cuts, size, twin_position(index, size, back=True)) if twins and size > 1 else own


class GradientReducer:
    """Sums a flat gradient buffer over the data-parallel axis.

    Args:
        grads: flat buffer, updated in place.
        spans: [start, stop) of every parameter in it.
        cuts: buckets, see `buckets`.
        axis: data-parallel line.
        scatter: leave each rank only its own interval of each bucket (ZeRO); the rest of the buffer is then undefined.
        twins: with `scatter`, also the interval of the rank that it mirrors (`twin_position`), to the bit.
    """

    def __init__(
        self,
        grads: Tensor,
        spans: Sequence[Interval],
        cuts: Sequence[Interval],
        axis: Axis,
        scatter: bool,
        twins: bool = False,
    ) -> None:
        self._grads, self._cuts, self._axis, self._scatter = grads, cuts, axis, scatter
        self._twins = twins and scatter and axis.size > 1
        self._mine = shard_intervals(cuts, axis.size, axis.index)
        self._mirrored = shard_intervals(cuts, axis.size, twin_position(axis.index, axis.size, back=True))
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
        self._handles: deque[tuple[int, Handle, Tensor | None]] = deque()
        self._messages: list[Handle] = []

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
            if self._twins:
                self._take(wait=False)
        else:
            self._handles.append((bucket, self._axis.all_reduce_(grads, async_op=True), None))

    def finish(self) -> None:
        """Wait for every bucket. All parameters must be `ready`."""
        if self._axis.size == 1:
            return
        assert self._next < 0, f"bucket {self._next} still misses gradients of {self._missing[self._next]} parameters"
        self._take(wait=True)
        for message in self._messages:
            message.wait()
        self._messages.clear()

    def _take(self, wait: bool) -> None:
        """Take in what has arrived, in the order it was started; with `wait` all of it."""
        while self._handles and (wait or self._handles[0][1].arrived()):
            bucket, handle, parts = self._handles.popleft()
            handle.wait()
            if parts is not None:
                start, stop = self._mine[bucket]
                torch.sum(parts, 0, out=self._grads[start:stop])
            if self._twins:
                self._exchange(bucket)

    def _exchange(self, bucket: int) -> None:
        """Own sums to the rank that mirrors them, and those of the rank mirrored here into their place. Nobody reads
        that part of the bucket any more, since its reduce-scatter has ended."""
        axis, size = self._axis, self._axis.size
        (a, b), (c, d) = self._mine[bucket], self._mirrored[bucket]
        self._messages.append(axis.isend(self._grads[a:b], twin_position(axis.index, size)))
        self._messages.append(axis.irecv(self._grads[c:d], twin_position(axis.index, size, back=True)))
