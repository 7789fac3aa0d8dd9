"""Buckets, shards, and the order in which reductions start."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.parallel.collectives import Axis, Handle, World
from raytron.parallel.data import GradientReducer, buckets, held_intervals, shard_intervals
from raytron.parallel.mesh import Mesh


@given(st.integers(0, 40), st.integers(0, 200), st.integers(1, 12))
def test_buckets_cover_the_buffer_in_order(quanta, elements, quantum):
    total = quanta * quantum
    cuts = buckets(total, elements, quantum)
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(total))
    assert all((stop - start) % quantum == 0 for start, stop in cuts)
    longest = max(quantum, elements + quantum - 1)
    assert all(stop - start <= longest for start, stop in cuts)


@given(st.integers(0, 12), st.integers(0, 60), st.integers(1, 3), st.integers(1, 5))
def test_shards_partition_every_bucket_equally(quanta, elements, grain, size):
    cuts = buckets(quanta * grain * size, elements, grain * size)
    shards = [shard_intervals(cuts, size, index) for index in range(size)]
    for bucket, (start, stop) in enumerate(cuts):
        parts = [shard[bucket] for shard in shards]
        assert [i for a, b in parts for i in range(a, b)] == list(range(start, stop))
        assert {b - a for a, b in parts} == {(stop - start) // size}


def test_a_buffer_must_be_a_multiple_of_the_quantum():
    with pytest.raises(AssertionError, match="no multiple of 4"):
        buckets(10, 4, 4)


class Recorder(Axis):
    """Notes which slices are reduced, and in which order."""

    def __init__(self) -> None:
        super().__init__("dp", (0, 1), 0, {}, None)
        self.started: list[int] = []

    def all_reduce_(self, tensor, op="sum", async_op=False):
        self.started.append(tensor.storage_offset())
        return Handle(None)


@st.composite
def spans_and_order(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    spans, at = [], 0
    for size in sizes:
        spans.append((at, at + size))
        at += size + draw(st.integers(0, 2))  # gaps of alignment
    order = draw(st.permutations(range(len(sizes))))
    return spans, at + -at % 2, order


@given(spans_and_order(), st.integers(2, 12))
def test_every_bucket_starts_once_back_to_front_and_not_before_it_is_whole(drawn, elements):
    spans, total, order = drawn
    cuts, axis = buckets(total, elements, 2), Recorder()
    reducer = GradientReducer(torch.zeros(total), spans, cuts, axis, scatter=False)
    for _ in range(2):  # a second step starts anew
        reducer.begin()
        axis.started.clear()
        for i, param in enumerate(order):
            reducer.ready(param)
            reducer.ready(param)  # telling twice is telling once
            missing = [spans[p] for p in order[i + 1 :]]
            begun = {start for start, stop in cuts if start in axis.started}
            for start, stop in cuts:
                whole = all(stop <= a or b <= start for a, b in missing)
                assert whole or start not in begun
        assert axis.started == [start for start, _ in reversed(cuts)]
        reducer.finish()


def test_finishing_early_names_the_bucket():
    reducer = GradientReducer(torch.zeros(8), [(0, 4), (4, 8)], buckets(8, 4, 4), Recorder(), scatter=False)
    reducer.begin()
    reducer.ready(0)
    with pytest.raises(AssertionError, match="bucket 1 still misses gradients of 1 parameters"):
        reducer.finish()


TOTAL, SPANS = 48, [(0, 10), (10, 11), (12, 31), (32, 48)]


def gradients(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(TOTAL, generator=generator, dtype=torch.float64)


def run_reducer(world: World, scatter: bool, elements: int, twins: bool = False) -> list[tuple[tuple[int, int], bytes]]:
    """Parameters become ready in another order on every rank; the sums are right all the same, step after step."""
    axis, flat = world.axis("dp"), torch.zeros(TOTAL, dtype=torch.float64)
    cuts = buckets(TOTAL, elements, 2 * axis.size)
    reducer = GradientReducer(flat, SPANS, cuts, axis, scatter, twins)
    for step in range(3):
        flat.copy_(gradients(axis.index, step))
        reducer.begin()
        for param in random.Random(axis.index + step).sample(range(len(SPANS)), len(SPANS)):
            reducer.ready(param)
        reducer.finish()
        wanted = sum(gradients(rank, step) for rank in range(axis.size))
        mine = held_intervals(cuts, axis.size, axis.index, twins) if scatter else [(0, TOTAL)]
        for start, stop in mine:
            torch.testing.assert_close(flat[start:stop], wanted[start:stop])
    return [((start, stop), flat[start:stop].numpy().tobytes()) for start, stop in mine]


@pytest.mark.parametrize("scatter", [False, True], ids=["all-reduce", "zero"])
@pytest.mark.parametrize("elements", [1, 20, 1000])
def test_gradients_are_summed_over_ranks(ranks, scatter, elements):
    ranks.run(run_reducer, Mesh(dp=4), scatter, elements)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_mirrored_shard_is_equal_to_the_bit(ranks, size):
    held: dict[tuple[int, int], list[bytes]] = {}
    for intervals in ranks.run(run_reducer, Mesh(dp=size), True, 5, True):
        for interval, bits in intervals:
            held.setdefault(interval, []).append(bits)
    assert sum(stop - start for start, stop in held) == TOTAL
    assert all(len(copies) == 2 and copies[0] == copies[1] for copies in held.values())


def test_a_single_rank_keeps_its_gradients():
    flat = torch.arange(8.0)
    reducer = GradientReducer(flat, [(0, 8)], buckets(8, 4, 4), Axis.single(), scatter=True)
    reducer.begin()
    reducer.ready(0)
    reducer.finish()
    assert flat.tolist() == list(range(8))
