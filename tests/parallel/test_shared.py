"""The shared directory holds what was written, readers take what changed, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from raytron.parallel import bulk, shared
from raytron.parallel.boxes import whole
from raytron.parallel.changes import Receiver, Sender, grouped
from raytron.parallel.checksum import checksum, combine
from raytron.parallel.layout import Layout, Piece, Spec, owners
from raytron.parallel.shared import SharedDirectory, SharedReader, SharedWeights
from raytron.parallel.storage import allocate, as_integers, torch_dtype, view

SHAPES = {"matrix": (37, 24), "experts": (3, 5, 8), "norm": (100,), "scalar": (), "wide": (2, 333)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """Several blocks to a tensor of this size."""
    monkeypatch.setattr(shared, "BLOCK", 256)


@pytest.fixture(params=[True, False], ids=["compiled", "torch"], autouse=True)
def compiled(request, monkeypatch) -> None:
    """With the C function, and as without a compiler."""
    if not request.param:
        monkeypatch.setattr(bulk, "_function", lambda: None)
    elif bulk._function() is None:
        pytest.skip("no C compiler")


@pytest.fixture(params=["float32", "bfloat16"])
def weights(request, tmp_path) -> Iterator[SharedWeights]:
    tensors = {name: Spec(shape, request.param) for name, shape in SHAPES.items()}
    directory = SharedDirectory(tensors, {"config.json": b"{}"}, tmp_path)
    yield SharedWeights(directory.path)
    directory.close()


def values(seed: int, dtype: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(torch_dtype(dtype)) for name, shape in SHAPES.items()}


def put(weights: SharedWeights, tensors: dict[str, torch.Tensor], turn: int, delta: bool = False) -> dict[str, int]:
    return {n: weights.write(n, whole(t.shape), t, turn, delta) % (1 << 64) for n, t in tensors.items()}


def dtype_of(weights: SharedWeights) -> str:
    return weights.specs["norm"].dtype


def test_anything_that_reads_safetensors_reads_it(weights):
    wanted = values(1, dtype_of(weights))
    sums = put(weights, wanted, 1)
    found = load_file(Path(weights.path) / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert sums == weights.checksums() == {name: checksum(tensor) for name, tensor in wanted.items()}
    assert (Path(weights.path) / "config.json").read_bytes() == b"{}"


def test_a_wider_dtype_is_cast_while_it_is_written(weights):
    wide = values(1, "float32")
    sums = put(weights, wide, 1)
    dtype = torch_dtype(dtype_of(weights))
    assert sums == {name: checksum(tensor.to(dtype)) for name, tensor in wide.items()}


@given(seed=st.integers(0, 1000), share=st.floats(0, 1), dtype=st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=20, deadline=None)
def test_a_delta_leaves_the_bits_of_a_whole_push(tmp_path_factory, seed: int, share: float, dtype: str):
    tensors = {name: Spec(shape, dtype) for name, shape in SHAPES.items()}
    directory = SharedDirectory(tensors, {}, tmp_path_factory.mktemp("shared"))
    try:
        weights = SharedWeights(directory.path)
        old, new = values(seed, dtype), changed(values(seed, dtype), share, seed)
        put(weights, old, 1)
        sums = put(weights, new, 2, delta=True)
        assert sums == weights.checksums() == {name: checksum(tensor) for name, tensor in new.items()}
        for name, tensor in new.items():
            for block, part in weights.blocks(name, whole(tensor.shape)):
                rows = tuple(slice(lo, hi) for lo, hi in part)
                same = torch.equal(as_integers(old[name][rows]), as_integers(tensor[rows]))
                assert weights.turns[block] == (1 if same else 2)
    finally:
        directory.close()


def changed(tensors: dict[str, torch.Tensor], share: float, seed: int) -> dict[str, torch.Tensor]:
    """Some elements with another sign: zero has a bit that a comparison of numbers does not see."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        tensor[torch.rand(tensor.shape, generator=generator) < 0.2] = 0.0
        flip = torch.rand(tensor.shape, generator=generator) < share
        tensor.copy_(torch.where(flip, -tensor, tensor))
    return tensors


def halves(dtype: str) -> Layout:
    """Two ranks: a matrix cut by columns, experts by their second dimension and transposed, the rest on both."""
    pieces: dict[str, list[Piece]] = {name: [] for name in SHAPES}
    sizes = {}
    for rank in (0, 1):
        place, at = f"rank-{rank}", 0
        for name, shape in SHAPES.items():
            dim = {"matrix": 1, "experts": 1}.get(name)
            box = tuple((rank * n // 2, (rank + 1) * n // 2) if d == dim else (0, n) for d, n in enumerate(shape))
            if name == "experts":
                box = tuple((0, 2) if d == 1 and not rank else (2, 5) if d == 1 else span for d, span in enumerate(box))
            order = range(len(shape)) if name == "experts" else reversed(range(len(shape)))
            strides, step = {}, 1
            for d in order:
                strides[d], step = step, step * (box[d][1] - box[d][0])
            pieces[name].append(Piece(box, "weights", at, tuple(strides[d] for d in range(len(shape))), (place,)))
            at += step
        sizes[place, "weights"] = at + 3
    merged = {name: tuple(held) for name, held in pieces.items()}
    return Layout(0, {name: Spec(shape, dtype) for name, shape in SHAPES.items()}, merged, sizes).check()


def single(dtype: str) -> Layout:
    """One rank that holds everything."""
    pieces, at = {}, 0
    for name, shape in SHAPES.items():
        pieces[name] = (Piece(whole(shape), "weights", at, shared._strides(shape), ("rank-0",)),)
        at += Spec(shape).numel
    return Layout(0, {name: Spec(shape, dtype) for name, shape in SHAPES.items()}, pieces, {("rank-0", "weights"): at})


class Ranks:
    """All ranks of a layout in this process."""

    def __init__(self, weights: SharedWeights, layout_of: Callable[[str], Layout] = halves) -> None:
        self.layout = layout_of(dtype_of(weights))
        self.buffers = allocate(self.layout)
        self.readers = [SharedReader(weights.path, self.layout, place, self.buffers) for place in self.layout.places]

    def take(self, turn: int | None) -> dict[str, int]:
        return combine(reader.take(turn) for reader in self.readers)

    def hold(self, tensors: dict[str, torch.Tensor]) -> bool:
        return all(
            torch.equal(
                view(self.buffers[piece.places[0], "weights"], piece.box, piece.spot()),
                tensors[name][tuple(slice(lo, hi) for lo, hi in piece.box)],
            )
            for name, piece in self.layout
        )


def test_every_rank_takes_its_own_boxes_and_the_sums_add_up(weights):
    ranks, new = Ranks(weights), values(3, dtype_of(weights))
    sums = put(weights, new, 1)
    assert ranks.take(1) == sums
    assert ranks.hold(new)


def test_readers_may_miss_pushes(weights):
    ranks, dtype = Ranks(weights), dtype_of(weights)
    tensors = values(1, dtype)
    put(weights, tensors, 1)
    ranks.take(1)
    for turn in (2, 3, 4):  # a change in another place each time
        tensors["matrix"][turn] += 1
        tensors["norm"][10 * turn] += 1
        sums = put(weights, tensors, turn, delta=True)
    assert ranks.take(4) == sums
    assert ranks.hold(tensors)


def test_only_newer_blocks_are_copied(weights):
    ranks, tensors = Ranks(weights, single), values(1, dtype_of(weights))
    put(weights, tensors, 1)
    ranks.take(1)
    (buffer,) = ranks.buffers.values()
    buffer.zero_()
    tensors["matrix"][0] += 1
    put(weights, tensors, 2, delta=True)
    ranks.take(2)
    (piece,) = ranks.layout.pieces["matrix"]
    held = view(buffer, piece.box, piece.spot())
    assert torch.equal(held[0], tensors["matrix"][0])
    assert not held[20:].any()
    for reader in ranks.readers:
        reader.forget()
    ranks.take(2)
    assert ranks.hold(tensors)


def test_a_reader_that_skipped_a_push_is_caught(weights):
    ranks, dtype = Ranks(weights, single), dtype_of(weights)
    put(weights, values(1, dtype), 1)
    ranks.take(1)
    sums = put(weights, values(2, dtype), 2)
    found = ranks.take(None)
    assert {name for name in sums if found[name] != sums[name]} == set(SHAPES)


def test_a_copy_of_a_tensor_on_another_rank_is_compared_too(weights):
    ranks, new = Ranks(weights), values(1, dtype_of(weights))
    put(weights, new, 1)
    ranks.take(1)
    owned = owners(ranks.layout)
    piece = next(p for p in ranks.layout.pieces["norm"] if p.places != owned.pieces["norm"][0].places)
    view(ranks.buffers[piece.places[0], "weights"], piece.box, piece.spot())[7] += 1
    with pytest.raises(ValueError, match=r"norm: rank-. holds other values than were pushed"):
        ranks.take(None)


def test_readers_of_another_dtype_are_refused(weights):
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype_of(weights)]
    with pytest.raises(ValueError, match=f"is {other} here and {dtype_of(weights)} in .*; give both one dtype"):
        SharedReader(weights.path, halves(other), "rank-0", {})


@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_messages_to_another_node_write_the_same_bits(weights, share: float):
    dtype = dtype_of(weights)
    boxes = [(name, piece.box) for name, piece in halves(dtype) if piece.places == ("rank-0",)]
    tensors = values(1, "float32")
    messages = grouped(boxes, weights.specs["norm"].itemsize, max_bytes=1000)
    assert [box for message in messages for box in message] == boxes
    slices = [[tensors[n][tuple(slice(*s) for s in box)] for n, box in message] for message in messages]
    senders = [Sender(views, torch_dtype(dtype)) for views in slices]
    receivers = [Receiver(weights, message) for message in messages]
    sizes = []
    for turn in (1, 2, 3):
        data = [sender.message(delta=True) for sender in senders]
        for receiver, message in zip(receivers, data, strict=True):
            message.flags.writeable = False
            receiver.write(message, turn, delta=True)
        sizes.append(sum(len(message) for message in data))
        for name, box in boxes:
            part = tensors[name][tuple(slice(*s) for s in box)].to(torch_dtype(dtype))
            assert torch.equal(weights.part(name, box), part)
        changed(tensors, share, turn)
    if share < 0.5:
        assert sizes[2] < sizes[0]


def test_a_directory_goes_when_it_is_closed_or_forgotten(tmp_path):
    tensors = {"w": Spec((4, 4))}
    first, second = (SharedDirectory(tensors, {}, tmp_path) for _ in range(2))
    assert first.path != second.path
    first.close()
    first.close()
    assert not Path(first.path).exists()
    assert Path(second.path).exists()  # the sweep of the next one has left it
    path = second.path
    del second
    assert not Path(path).exists()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    script = (
        "import os, signal\n"
        "from raytron.parallel.layout import Spec\n"
        "from raytron.parallel.shared import SharedDirectory\n"
        f"made = SharedDirectory({{'w': Spec((4, 4))}}, {{}}, {str(tmp_path)!r})\n"
        "print(made.path, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    left = Path(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip())
    assert left.exists()
    SharedDirectory({"w": Spec((4, 4))}, {}, tmp_path).close()
    assert not left.exists()


def test_without_room_in_memory_it_goes_to_the_fallback(tmp_path, monkeypatch):
    usage = shared.shutil.disk_usage("/tmp")._replace(free=0)
    monkeypatch.setattr(shared.shutil, "disk_usage", lambda _: usage)
    directory = SharedDirectory({"w": Spec((4, 4))}, {}, tmp_path)
    assert Path(directory.path).parent == tmp_path
    assert os.stat(directory.path).st_mode & 0o077 == 0
    assert np.all(SharedWeights(directory.path).turns == 0)
    directory.close()
