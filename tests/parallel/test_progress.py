"""A reader follows the writers of a push block by block: it takes nothing early, and waits for nobody who is gone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.parallel import progress
from raytron.parallel.boxes import whole
from raytron.parallel.bulk import WRITE, WRITE_CHANGED, Transfer
from raytron.parallel.checksum import checksum, combine
from raytron.parallel.layout import Spec, plan
from raytron.parallel.progress import Progress, WriterGone
from raytron.parallel.shared import SharedDirectory, SharedWeights
from raytron.parallel.storage import allocate, find, view
from tests.parallel.test_shared import SHAPES, Ranks, changed, compiled, halves, single, small_blocks, values

__all__ = ["compiled", "small_blocks"]  # fixtures

JOIN_S = 60.0


@pytest.fixture(params=["float32", "bfloat16"])
def weights(request, tmp_path) -> Iterator[SharedWeights]:
    """A directory with two writers."""
    directory = SharedDirectory({n: Spec(shape, request.param) for n, shape in SHAPES.items()}, {}, tmp_path, 2)
    yield SharedWeights(directory.path)
    directory.close()


@pytest.fixture(params=[1, 3], ids=["thread", "threads"])
def threads(request) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def in_background(function, *args) -> Future:
    """What a function gives, once it ends."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Writers:
    """Two ranks that hold a model as `halves` says, each with a part of every block of a tensor cut by columns."""

    def __init__(self, weights: SharedWeights, dtype: str) -> None:
        self.weights, self.layout = weights, halves(dtype)
        self.buffers = allocate(self.layout)
        moves = plan(self.layout, weights.layout).moves
        self.bulks = [weights.bulk([self._transfer(m) for m in moves if m.src == (place,)]) for place in self.places]

    @property
    def places(self) -> tuple[str, ...]:
        return self.layout.places

    def _transfer(self, move) -> Transfer:
        source = view(find(self.buffers, move.src[0], move.at.buffer), move.box, move.at)
        return Transfer(move.name, move.box, SHAPES[move.name], self.weights.part(move.name, move.box), source)

    def hold(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, piece in self.layout:
            box = tuple(slice(*span) for span in piece.box)
            view(self.buffers[piece.places[0], "weights"], piece.box, piece.spot()).copy_(tensors[name][box])

    def write(self, rank: int, turn: int, delta: bool = False, stop: int | None = None) -> None:
        """A rank's part of a push, as `Publisher` writes it; until block `stop`, where it dies."""
        progress, bulk = self.weights.progress, self.bulks[rank]
        reached = [*bulk.starts, progress.blocks]
        if stop is not None:
            reached = [min(blocks, stop) for blocks in reached]
        pace = progress.writing(rank, turn, reached[0])
        sums = bulk.run(WRITE_CHANGED if delta else WRITE, turn, pace).sums
        for rest, blocks in zip(bulk.rest, reached[1:], strict=True):
            sums.append((rest.name, self.weights.write(rest.name, rest.box, rest.source, turn, delta)))
            progress.reach(rank, turn, blocks)
        if stop is None:
            progress.seal(rank, turn, combine({name: part} for name, part in sums))


def sums_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: checksum(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("delta", [False, True], ids=["whole", "delta"])
@pytest.mark.parametrize("layout_of", [halves, single])
def test_readers_that_come_early_or_late_hold_what_was_written(weights, threads, layout_of, delta: bool):
    dtype = weights.specs["norm"].dtype
    writers, early, late = Writers(weights, dtype), Ranks(weights, layout_of), Ranks(weights, layout_of)
    tensors = values(1, dtype)
    for turn in range(1, 4):
        writers.hold(tensors)
        taking = [in_background(reader.take, turn) for reader in early.readers]
        told = in_background(SharedWeights(weights.path).progress.sums, turn)
        for rank in (turn % 2, 1 - turn % 2):
            writers.write(rank, turn, delta)
        taken = combine(each.result(JOIN_S) for each in taking)
        assert taken == told.result(JOIN_S) == sums_of(tensors) == late.take(turn)
        assert early.hold(tensors)
        assert late.hold(tensors)
        changed(tensors, 0.05, turn)


@given(written=st.lists(st.integers(0, 30), min_size=2, max_size=2), delta=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_writers_that_die_half_way_release_their_readers_and_the_next_push_mends_it(
    tmp_path_factory, written: list[int], delta: bool, seed: int
):
    tensors = {name: Spec(shape) for name, shape in SHAPES.items()}
    directory = SharedDirectory(tensors, {}, tmp_path_factory.mktemp("shared"), 2)
    try:
        weights = SharedWeights(directory.path)
        writers, ranks = Writers(weights, "float32"), Ranks(weights)
        old, new = values(seed, "float32"), values(9, "float32")
        writers.hold(old)
        for rank in (0, 1):
            writers.write(rank, 1)
        assert ranks.take(1) == sums_of(old)
        writers.hold(new)
        taking = [in_background(reader.take, 2) for reader in ranks.readers]
        for rank, blocks in enumerate(written):
            writers.write(rank, 2, delta, stop=min(blocks, weights.progress.blocks - 1))
        assert not any(each.done() for each in taking)  # the last block is not there: nobody may have come to an end
        weights.progress.give_up(2)
        for each in taking:
            with pytest.raises(WriterGone, match=r"push 2 was given up with \d+ of \d+ blocks written: a rank of the"):
                each.result(JOIN_S)
        writers.hold(new)
        for rank in (0, 1):
            writers.write(rank, 3, delta)
        assert ranks.take(3) == sums_of(new)
        assert ranks.hold(new)
    finally:
        directory.close()


def test_a_block_is_taken_when_it_is_written_and_not_before(weights):
    """One writer goes on by single blocks, the other one is through."""
    dtype, told = weights.specs["norm"].dtype, weights.progress
    tensors, ranks = values(1, dtype), Ranks(weights, single)
    (buffer,) = ranks.buffers.values()
    told.reach(1, 1, told.blocks)
    taking = in_background(ranks.readers[0].take, 1)
    blocks = [(name, part) for name in weights.specs for _, part in weights.blocks(name, whole(SHAPES[name]))]
    assert len(blocks) == told.blocks
    for number, (name, part) in enumerate(blocks):
        rows = tuple(slice(*span) for span in part)
        (piece,) = ranks.layout.pieces[name]
        mine = view(buffer, piece.box, piece.spot())[rows]
        assert not mine.any()
        weights.write(name, part, tensors[name][rows], 1)
        assert not mine.any()
        told.reach(0, 1, number + 1)
    assert taking.result(JOIN_S) == sums_of(tensors)
    assert ranks.hold(tensors)


def test_a_writer_that_does_not_move_is_waited_for_until_patience_ends(weights, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.05)
    ranks = Ranks(weights)
    weights.progress.reach(0, 1, 3)
    for reader in ranks.readers:
        with pytest.raises(WriterGone, match=r"push 1 has not moved for 0\.05 s, with 0 of \d+ blocks written: a rank"):
            reader.take(1)
    with pytest.raises(WriterGone, match="push 1 has not moved"):
        weights.progress.sums(1)


def test_what_was_reached_is_not_taken_back(weights):
    told = weights.progress
    told.reach(0, 3, 2)
    told.reach(0, 3, 1)
    told.reach(0, 2, told.blocks)
    told.reach(1, 3, 2)
    told.wait(3, 2)
    told.give_up(3)
    told.give_up(2)
    with pytest.raises(WriterGone, match="push 3 was given up with 2 of"):
        told.wait(3, 3)


@given(writers=st.integers(0, 5), tensors=st.integers(1, 20), data=st.data())
def test_sums_of_all_writers_add_up(writers: int, tensors: int, data):
    names = [f"t{k}" for k in range(tensors)]
    told = Progress(np.zeros(Progress.size(writers, tensors) // 8, np.int64).data, names, 7)
    assert told.writers == writers
    parts = [
        {name: data.draw(st.integers(0, 2**64 - 1)) for name in data.draw(st.sets(st.sampled_from(names)))}
        for _ in range(writers)
    ]
    for writer, sums in enumerate(parts):
        told.seal(writer, 1, sums)
    wanted = dict.fromkeys(names, 0) | combine(parts)
    assert told.sums(1) == wanted
    for writer in range(writers):  # what a push leaves out stands as it was
        told.seal(writer, 2, {})
    assert told.sums(2) == wanted
