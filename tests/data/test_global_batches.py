"""The loader: one set of samples for any dp and micro-batch size, `consumed_samples` as the whole state."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import TrainConfig
from raytron.data import GlobalBatches, Sample


class Counting:
    """Sample i holds i everywhere, and fails where told to."""

    document_mask = False
    restart_positions = False

    def __init__(self, length: int, fails_at: int | None = None, sequence_length: int = 3) -> None:
        self.length, self.fails_at, self.sequence_length = length, fails_at, sequence_length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if index == self.fails_at:
            raise OSError("the disk is gone")
        self.read.append(index)
        ids = np.full(self.sequence_length, index)
        return Sample(ids, ids + 1, np.ones(len(ids), np.float32), np.arange(len(ids)), np.zeros(len(ids), np.int32))


def ids(batches) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch.tokens_BS]


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(0, 20))
def test_a_step_has_the_same_samples_in_any_layout(micro, dp, accumulate, consumed) -> None:
    size = micro * dp * accumulate
    batches = GlobalBatches(Counting(100), size, micro, 3)
    ranks = [batches.read(consumed, rank, dp) for rank in range(dp)]
    assert sorted(i for rank in ranks for i in ids(rank)) == list(range(consumed, consumed + size))
    assert all(len(rank) == accumulate for rank in ranks)
    assert ids(GlobalBatches(Counting(100), size, 1, 3).read(consumed)) == list(range(consumed, consumed + size))
    for m in range(accumulate):  # Megatron's sampler: each micro-step is a run of micro * dp consecutive ids
        step = [i for rank in ranks for i in ids(rank[m : m + 1])]
        assert step == list(range(consumed + m * micro * dp, consumed + (m + 1) * micro * dp))


def test_types_and_optional_fields() -> None:
    dataset = Counting(8)
    batch = GlobalBatches(dataset, 4, 2, 3).read(0)[1]
    assert batch.tokens_BS.tolist() == [[2, 2, 2], [3, 3, 3]]
    assert batch.labels_BS.tolist() == [[3, 3, 3], [4, 4, 4]]
    assert [t.dtype for t in (batch.tokens_BS, batch.labels_BS)] == [torch.int64] * 2
    assert batch.loss_mask_BS.dtype == torch.float32
    assert (batch.position_ids_BS, batch.document_ids_BS) == (None, None)
    dataset.document_mask = dataset.restart_positions = True
    batch = GlobalBatches(dataset, 4, 2, 3).read(0)[1]
    assert batch.position_ids_BS is not None
    assert batch.document_ids_BS is not None
    assert (batch.position_ids_BS.dtype, batch.document_ids_BS.dtype) == (torch.int64, torch.int32)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([1, 2, 3]), st.integers(1, 5), st.integers(0, 9), st.integers(0, 20))
def test_ranks_that_do_not_divide_the_batch_share_it_as_evenly_as_it_goes(micro, dp, more, consumed) -> None:
    size = micro * (dp + more)
    batches = GlobalBatches(Counting(100), size, micro, 3)
    ranks = [batches.read(consumed, rank, dp) for rank in range(dp)]
    assert sorted(i for rank in ranks for i in ids(rank)) == list(range(consumed, consumed + size))
    counts = [len(rank) for rank in ranks]
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1
    chosen = TrainConfig(global_batch_size=size, micro_batch_size=micro)
    assert counts == [chosen.micro_batches(dp, rank, uneven=True) for rank in range(dp)]


def test_bad_divisions() -> None:
    with pytest.raises(ValueError, match="global_batch_size 5 isn't a positive multiple of micro_batch_size 2"):
        GlobalBatches(Counting(9), 5, 2, 3)
    with pytest.raises(ValueError, match="fewer micro-batches of micro_batch_size 2 than there are ranks, dp 4"):
        GlobalBatches(Counting(9), 4, 2, 3).read(0, 0, 4)
    with pytest.raises(ValueError, match="fewer micro-batches"):
        GlobalBatches(Counting(9), 4, 2, 3).prefetch(0, 0, 4)
    with pytest.raises(ValueError, match="built for 3"):
        GlobalBatches(Counting(9), 4, 2, 5)
    with pytest.raises(IndexError, match="ends at sample 9"):
        GlobalBatches(Counting(9), 4, 2, 3).read(6)


def test_prefetch_resumes_anywhere() -> None:
    batches = GlobalBatches(Counting(23), 4, 2, 3)
    with batches.prefetch(0, 1, 2) as whole:
        straight = [ids(step) for step in whole]
    assert len(straight) == 5
    assert whole.consumed_samples == 20
    with batches.prefetch(8, 1, 2) as rest:
        assert [ids(step) for step in rest] == straight[2:]
        assert next(rest, None) is None


def test_prefetch_reads_ahead_no_further_than_told() -> None:
    dataset = Counting(1000)
    with GlobalBatches(dataset, 4, 4, 3).prefetch(0, depth=2) as steps:
        for _ in range(5):
            next(steps)
            # handed out, in the buffer, and the one that waits for room
            assert len(dataset.read) <= steps.consumed_samples + (2 + 1) * 4
        assert steps.consumed_samples == 20


def test_close_ends_the_thread_and_the_iteration() -> None:
    before = set(threading.enumerate())
    steps = GlobalBatches(Counting(1000), 4, 4, 3).prefetch(0)
    next(steps)
    steps.close()
    steps.close()
    assert set(threading.enumerate()) == before
    assert list(steps) == []


def test_close_frees_a_waiting_reader() -> None:
    """A dataset that blocks in its first read; the reader waits for it, another thread closes."""
    reading, release = threading.Event(), threading.Event()

    class Blocking(Counting):
        def __getitem__(self, index: int) -> Sample:
            reading.set()
            release.wait()
            return super().__getitem__(index)

    steps = GlobalBatches(Blocking(100), 4, 4, 3).prefetch(0)
    reading.wait()
    result: list[list] = []
    reader = threading.Thread(target=lambda: result.append(list(steps)))
    reader.start()
    closer = threading.Thread(target=steps.close)
    closer.start()
    reader.join()
    release.set()
    closer.join()
    assert result == [[]]


def test_errors_reach_the_step_they_belong_to() -> None:
    with GlobalBatches(Counting(100, fails_at=9), 4, 2, 3).prefetch(0, depth=4) as steps:
        assert ids(next(steps)) == [0, 1, 2, 3]
        assert ids(next(steps)) == [4, 5, 6, 7]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(steps)
