"""Reading from files equals planning in memory, and notices every altered byte."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.checkpoint import DamagedFile
from raytron.checkpoint.digest import CHUNK, digest_of
from raytron.checkpoint.reading import Copy, by_path, copies, read, weight_files
from raytron.checkpoint.storage import LocalStorage
from raytron.checkpoint.writing import Sink
from raytron.parallel.layout import Layout, Piece, plan


@settings(deadline=None)
@given(st.data())
def test_copies_in_any_order_and_shape(tmp_path_factory, data):
    """Strided, overlapping, gapped and casting copies of one file, with and without verification."""
    values = torch.arange(240, dtype=torch.int32)
    storage = LocalStorage(tmp_path_factory.mktemp("reading"))
    head = data.draw(st.integers(0, 2)) * 4
    storage.write("file", b"h" * head + values.numpy().tobytes() + b"tail")
    wanted, expected = [], []
    for _ in range(data.draw(st.integers(0, 5))):
        rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
        pitch, start = data.draw(st.integers(columns, 12)), data.draw(st.integers(0, 180))
        dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
        target = torch.full((4 + rows * columns,), -1, dtype=dtype)
        strides = data.draw(st.sampled_from([(columns, 1), (1, rows)]))
        wanted.append(Copy(head + 4 * start, torch.int32, (rows, columns), (pitch, 1), target, 2, strides))
        expected.append(values.as_strided((rows, columns), (pitch, 1), start))
    entry = digest_of(storage.read("file"))
    read(storage, {"file": wanted}, {"file": entry} if data.draw(st.booleans()) else {})
    for copy, values_in in zip(wanted, expected, strict=True):
        got = copy.target.as_strided(copy.sizes, copy.target_strides, copy.offset)
        assert torch.equal(got, values_in.to(got.dtype))
        rest = copy.target.clone()
        rest.as_strided(copy.sizes, copy.target_strides, copy.offset).fill_(-1)
        assert (rest == -1).all()


def test_neighbouring_runs_become_one_read(tmp_path):
    """A buffer of many tensors read back as it was written costs one read per chunk, not one per tensor."""
    storage = CountingStorage(tmp_path)
    values = torch.arange(1000)
    storage.write("file", values.numpy().tobytes())
    target = torch.empty_like(values)
    wanted = [Copy(8 * at, torch.int64, (5, 2), (2, 1), target, at, (2, 1)) for at in range(0, 1000, 10)]
    read(storage, {"file": wanted}, {"file": digest_of(storage.read("file"))})
    assert torch.equal(target, values)
    assert storage.opened[-1].reads == 1


class CountingStorage(LocalStorage):
    def __init__(self, root) -> None:
        super().__init__(root)
        self.opened = []

    def reader(self, path):
        self.opened.append(CountingReader(super().reader(path)))
        return self.opened[-1]


class CountingReader:
    def __init__(self, file) -> None:
        self._file, self.chunk, self.reads = file, file.chunk, 0

    def read_into(self, start, view) -> None:
        self.reads += 1
        self._file.read_into(start, view)

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize("position", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 6])
def test_a_flipped_bit_anywhere_is_found(tmp_path, position):
    storage = LocalStorage(tmp_path)
    data = bytearray(range(256)) * (2 * CHUNK // 256) + b"the end"
    with ThreadPoolExecutor(1) as pool:
        sink = Sink(storage, "file", pool)
        sink.write(bytes(data[:1000]))
        sink.write(torch.frombuffer(data, dtype=torch.uint8)[1000:])
        entry = sink.close()
    assert entry == digest_of(bytes(data))
    target = torch.empty(1000, dtype=torch.uint8)
    wanted = {"file": [Copy(500, torch.uint8, (1000,), (1,), target, 0, (1,))]}
    read(storage, wanted, {"file": entry})
    data[position] ^= 4
    storage.write("file", bytes(data))
    with pytest.raises(DamagedFile, match=r"file: its bytes"):
        read(storage, wanted, {"file": entry})


def test_planning_from_files(storage):
    """A transposed, padded target is filled as the layout says."""
    from safetensors.torch import save

    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0), "c": torch.arange(4).to(torch.bfloat16)}
    storage.write("model.safetensors", save(tensors))
    files = weight_files(storage)
    pieces = {
        "a": (Piece(((0, 2), (1, 3)), "w", 3, (1, 2), ("me",)),),
        "b": (Piece((), "w", 0, (), ("me",)),),
        "c": (Piece(((1, 3),), "w", 8, (1,), ("me",)),),
    }
    target = torch.zeros(12)
    moves = plan(files.layout, Layout(0, files.layout.tensors, pieces, {("me", "w"): 12}))
    read(storage, by_path(copies(moves, files.regions, {("me", "w"): target})), {})
    assert target.tolist() == [7, 0, 0, 1, 4, 2, 5, 0, 1, 2, 0, 0]


def test_unreadable_directories(storage):
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        weight_files(storage)
    storage.write("model.safetensors", b"\x80" + bytes(20))
    with pytest.raises(DamagedFile, match=r"runs/model.safetensors"):
        weight_files(storage)
    storage.delete("model.safetensors")
    storage.write("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(DamagedFile, match=r"model-00001-of-00002.safetensors: missing"):
        weight_files(storage)
    storage.write("model.safetensors.index.json", b"[]")
    with pytest.raises(DamagedFile, match=r"index.json: can't be read"):
        weight_files(storage)
