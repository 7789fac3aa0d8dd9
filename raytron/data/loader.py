"""Global batches as a pure function of the number of consumed samples.

Megatron's sampler: a global batch is the next `global_batch_size` consecutive samples; micro-step m of data-parallel
rank r reads ``[m * micro * dp + r * micro, ... + micro)`` of them; where dp does not divide them, the last is the first
ranks' alone. So the set of samples of a step depends neither on dp nor on the micro-batch size, and the only state of a
loader is `consumed_samples`: a resized run goes on where it stopped, with no sample lost or repeated. A
`torch.utils.data.DataLoader` would bring worker processes and a state of its own that is bound to the number of ranks;
reading mapped tokens takes one thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch

from raytron.data.gpt import Sample


class SampleDataset(Protocol):
    """`GPTDataset`, `BlendedDataset` or `SFTDataset`."""

    sequence_length: int
    document_mask: bool
    restart_positions: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class MicroBatch:
    """B samples of S tokens, on the CPU."""

    tokens_BS: torch.Tensor  # int64
    labels_BS: torch.Tensor  # int64
    loss_mask_BS: torch.Tensor  # float32
    position_ids_BS: torch.Tensor | None = None  # int64; None: 0, 1, 2, ... in every row
    document_ids_BS: torch.Tensor | None = None  # int32; None: attention sees the whole row
    parent_ids_BS: torch.Tensor | None = None  # int32; the document it continues, which attention sees too, or its own
    fields_BS: Mapping[str, torch.Tensor] = field(default_factory=dict)  # further numbers of each label, for objectives

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """The same with `function` applied to every tensor."""
        fields = {name: function(tensor) for name, tensor in self.fields_BS.items()}
        own = {name: None if t is None else function(t) for name, t in vars(self).items() if name != "fields_BS"}
        return MicroBatch(**own, fields_BS=fields)


class GlobalBatches:
    """Reads any rank's part of any global batch of `dataset`, which says whether batches carry document ids (it was
    built with `document_mask`) and position ids (built so that they restart with the document).

    trim: leave out the columns behind the last of a micro-batch that has a loss, which no other depends on, down to a
    multiple of this; None keeps all.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        global_batch_size: int,
        micro_batch_size: int,
        sequence_length: int,
        trim: int | None = None,
    ) -> None:
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % micro_batch_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} isn't a positive multiple of micro_batch_size"
                f" {micro_batch_size}; change one of them"
            )
        if dataset.sequence_length != sequence_length:
            raise ValueError(
                f"sequence_length {sequence_length}, but the dataset was built for {dataset.sequence_length}; build it"
                " again"
            )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.sequence_length = sequence_length
        self.trim = trim

    def sample_ids(self, consumed_samples: int, dp_rank: int = 0, dp_size: int = 1) -> list[range]:
        """The samples of each micro-batch of a rank, in the global batch that begins after `consumed_samples`."""
        assert 0 <= dp_rank < dp_size
        stride = self.micro_batch_size * dp_size
        if self.global_batch_size < stride:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} has fewer micro-batches of micro_batch_size"
                f" {self.micro_batch_size} than there are ranks, dp {dp_size}; change one of them"
            )
        first = consumed_samples + dp_rank * self.micro_batch_size
        starts = range(first, consumed_samples + self.global_batch_size, stride)
        return [range(start, start + self.micro_batch_size) for start in starts]

    def read(self, consumed_samples: int, dp_rank: int = 0, dp_size: int = 1) -> list[MicroBatch]:
        """The micro-batches of a rank. Raises IndexError where the dataset ends before the global batch does."""
        if consumed_samples + self.global_batch_size > len(self.dataset):
            raise IndexError(
                f"the dataset ends at sample {len(self.dataset)}, inside the global batch of samples"
                f" {consumed_samples}..{consumed_samples + self.global_batch_size}; build it with more samples"
            )
        return [self._collate(ids) for ids in self.sample_ids(consumed_samples, dp_rank, dp_size)]

    def prefetch(self, consumed_samples: int, dp_rank: int = 0, dp_size: int = 1, depth: int = 2) -> Prefetcher:
        """The global batches from `consumed_samples` on, `depth` of them read ahead."""
        return Prefetcher(self, consumed_samples, dp_rank, dp_size, depth)

    def _collate(self, ids: range) -> MicroBatch:
        samples = [self.dataset[i] for i in ids]
        width = self._width(samples)

        def stack(name: str) -> torch.Tensor:
            return torch.from_numpy(np.stack([getattr(sample, name)[:width] for sample in samples]))

        return MicroBatch(
            tokens_BS=stack("tokens_S"),
            labels_BS=stack("labels_S"),
            loss_mask_BS=stack("loss_mask_S"),
            position_ids_BS=stack("position_ids_S") if self.dataset.restart_positions else None,
            document_ids_BS=stack("document_ids_S") if self.dataset.document_mask else None,
        )

    def _width(self, samples: Sequence[Sample]) -> int:
        if self.trim is None:
            return self.sequence_length
        used = max(int(np.flatnonzero(sample.loss_mask_S)[-1:].sum()) for sample in samples) + 1
        return min(self.sequence_length, used + -used % self.trim)


class Prefetcher:
    """Iterates over a rank's global batches, which one thread reads ahead.

        thread: read batch k -> buffer (at most `depth`) -> __next__ in the training loop

    Iteration ends where the dataset can't fill a further global batch. An error of the thread is raised by the
    `__next__` whose batch it was. `close` (or leaving the context) ends the thread and waits for it. `consumed_samples`
    counts what was handed out, never what was read ahead: it is the state to save.
    """

    def __init__(self, batches: GlobalBatches, consumed_samples: int, dp_rank: int, dp_size: int, depth: int) -> None:
        self.consumed_samples = consumed_samples
        self._batches = batches
        self._seat = (dp_rank, dp_size)
        self._depth = max(1, depth)
        self._buffer: deque[list[MicroBatch] | BaseException] = deque()
        self._closed = False
        self._changed = threading.Condition()
        batches.sample_ids(consumed_samples, *self._seat)  # a wrong division is the caller's error, not the thread's
        self._thread = threading.Thread(
            target=self._fill, args=(consumed_samples,), name="raytron-prefetch", daemon=True
        )
        self._thread.start()

    def _fill(self, consumed: int) -> None:
        try:
            while consumed + self._batches.global_batch_size <= len(self._batches.dataset):
                if not self._put(self._batches.read(consumed, *self._seat)):
                    return
                consumed += self._batches.global_batch_size
            self._put(StopIteration())
        except Exception as error:  # whatever it is, it belongs to the loop that waits for this batch
            self._put(error)

    def _put(self, item: list[MicroBatch] | BaseException) -> bool:
        """Wait for room, then add `item`; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._buffer) < self._depth)
            if not self._closed:
                self._buffer.append(item)
                self._changed.notify_all()
            return not self._closed

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._buffer)
            if self._closed:
                raise StopIteration
            if isinstance(self._buffer[0], BaseException):
                raise self._buffer[0]  # left there: asking again gives the same answer
            self._changed.notify_all()
            self.consumed_samples += self._batches.global_batch_size
            return self._buffer.popleft()

    def close(self) -> None:
        """End the thread and drop what it read ahead. May be called again, and from any thread."""
        with self._changed:
            self._closed = True
            self._buffer.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
