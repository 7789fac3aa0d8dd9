"""Safetensors files as places: `file:NAME` holds each tensor in a buffer of the tensor's own name, in C order.

Reading takes only the byte ranges a plan asks for, straight into the target where the bytes are its own; otherwise
through a scratch block, so the extra memory is a few MiB and never a tensor. Writing streams boxes to their place in a
temporary file; any number of ranks that share the file system may write their own boxes of one file. Memory mapping was
rejected: page by page it reads at half the speed, counts as the process's memory, and a full disk kills the process.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from raytron.parallel.boxes import Box
from raytron.parallel.file_layout import PREFIX, Header, file_order, header_bytes, read_header
from raytron.parallel.pieces import Layout, Place, Spec, Spot
from raytron.parallel.planning import Plan
from raytron.parallel.storage import Buffers, as_bytes, copy_, find, torch_dtype, view

_BLOCK = 1 << 24  # bytes of scratch, and of one read or write call
_GAP = 1 << 13  # a smaller gap is read along: a system call costs as much as reading this many bytes
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.safetensors")


# Strided boxes of a file as runs of bytes


@dataclass(frozen=True)
class _Box:
    """A box of a tensor in a file, its dimensions in the order of the file (widest stride first, size 1 left out)."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int  # byte of the first element
    itemsize: int

    @staticmethod
    def of(box: Box, spot: Spot, data: int, itemsize: int) -> _Box:
        long = (d for d, (lo, hi) in enumerate(box) if hi - lo > 1)
        order = tuple(sorted(long, key=lambda d: -spot.strides[d]))
        sizes = tuple(box[d][1] - box[d][0] for d in order)
        return _Box(order, sizes, tuple(spot.strides[d] for d in order), data + spot.offset * itemsize, itemsize)

    def arranged(self, values: torch.Tensor) -> torch.Tensor:
        """A view of canonical values with this box's dimensions."""
        short = [d for d in range(values.dim()) if d not in self.order]
        return values.permute(*self.order, *short).reshape(self.sizes) if values.dim() else values

    @property
    def run_dims(self) -> int:
        """How many of the last dimensions are one run of neighbouring elements."""
        run, n = 1, 0
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if stride != run:
                break
            run, n = run * size, n + 1
        return n

    @property
    def outer(self) -> int:
        return len(self.sizes) - self.run_dims

    @property
    def run(self) -> int:
        """Bytes of one run."""
        return math.prod(self.sizes[self.outer :]) * self.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.itemsize

    @property
    def span(self) -> int:
        """Bytes from the first to the last."""
        return (1 + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))) * self.itemsize

    @property
    def dense(self) -> bool:
        """Whether the gaps between runs are small enough to read the whole span at once."""
        return self.outer == 0 or self.strides[self.outer - 1] * self.itemsize - self.run < _GAP

    def starts(self) -> Iterator[int]:
        """The byte at which each run starts, in order."""
        return offsets(self.start, self.sizes[: self.outer], self.strides[: self.outer], self.itemsize)

    def blocks(self) -> Iterator[tuple[_Box, tuple[slice, ...]]]:
        """Parts that fit a scratch block, and where they are in the arranged values."""
        if not self.sizes or (self.span if self.dense else self.nbytes) <= _BLOCK:
            yield self, ()
            return
        row = _Box(self.order[1:], self.sizes[1:], self.strides[1:], self.start, self.itemsize)
        pitch = self.strides[0] * self.itemsize
        rows = _BLOCK // max(pitch if self.dense else row.nbytes, 1)
        for at in range(0, self.sizes[0], max(rows, 1)):
            start = self.start + at * pitch
            if rows:
                n = min(rows, self.sizes[0] - at)
                yield _Box(self.order, (n, *self.sizes[1:]), self.strides, start, self.itemsize), (slice(at, at + n),)
            else:
                for part, where in _Box(row.order, row.sizes, row.strides, start, self.itemsize).blocks():
                    yield part, (slice(at, at + 1), *where)


def offsets(start: int, sizes: Sequence[int], strides: Sequence[int], itemsize: int) -> Iterator[int]:
    """Byte offsets of a strided grid, last dimension fastest."""
    steps = (range(0, n * s * itemsize, s * itemsize) for n, s in zip(sizes, strides, strict=True))
    return (start + sum(steps) for steps in product(*steps))


def _run_bytes(box: _Box, flat: torch.Tensor, values: torch.Tensor) -> Iterator[tuple[int, int]] | None:
    """(byte in the file, byte in `flat`'s memory) of each run, None where a run's elements are not neighbours there.

    values: the arranged view of the 1-D buffer `flat`.
    """
    if flat.device.type != "cpu" or not flat.is_contiguous():
        return None
    expected = 1
    for d in reversed(range(box.outer, len(box.sizes))):
        if values.stride(d) != expected:
            return None
        expected *= box.sizes[d]
    first = (values.storage_offset() - flat.storage_offset()) * box.itemsize
    there = offsets(first, box.sizes[: box.outer], values.stride()[: box.outer], box.itemsize)
    return zip(box.starts(), there, strict=True)


def _memory(flat: torch.Tensor) -> memoryview:
    return memoryview(as_bytes(flat).numpy())


def _file_name(place: Place) -> str:
    if not place.startswith(PREFIX):
        raise ValueError(f"place {place!r} is not a file; split the plan with Plan.filter and run each part apart")
    return place.removeprefix(PREFIX)


# Transports


class FileReader:
    """Transport from the files of `file_layout(root)` into this process's buffers; moves to other places are skipped.

    root: the directory (or single file) that was given to `file_layout`. targets: (place, buffer) -> flat tensor;
    looked up at each move, so staging buffers may come and go between buckets.
    Extra memory: one scratch block where bytes must be cast, transposed or sent to a device, none where they need not.
    Use as a context manager, or `close()`.
    """

    def __init__(self, root: str | Path, targets: Buffers, threads: int = 2):
        root = Path(root)
        self._root = root.parent if root.is_file() else root
        self._targets = targets
        self._open: dict[str, tuple[int, Header]] = {}
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and stop the reading threads."""
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()
        if self._pool is not None:
            self._pool.shutdown()

    def move(self, bucket: Plan) -> None:
        mine = {place for place, _ in self._targets}
        jobs = [
            (_file_name(src), move.at.buffer, move.at.offset, i, dst)
            for i, move in enumerate(bucket.moves)
            for src, dst in move.pairs()
            if dst in mine
        ]
        for file, name, _, i, dst in sorted(jobs):  # in the order of the file
            move = bucket.moves[i]
            fd, header = self._file(file)
            spec = header.specs.get(name)
            if spec != (expected := bucket.source[move.name]) and (spec is None or spec.dtype != expected.dtype):
                raise ValueError(f"{self._root / file}: {name} is {spec}, and {expected} was planned; plan again")
            box = _Box.of(move.box, move.at, header.starts[name], spec.itemsize)
            flat = find(self._targets, dst, move.to.buffer)
            self._read(file, fd, box, torch_dtype(spec.dtype), flat, box.arranged(view(flat, move.box, move.to)))

    def finish(self) -> None:
        """Bytes have arrived when `move` returns."""

    def _file(self, name: str) -> tuple[int, Header]:
        if name not in self._open:
            header = read_header(self._root / name)
            self._open[name] = os.open(self._root / name, os.O_RDONLY), header
        return self._open[name]

    def _read(
        self, file: str, fd: int, box: _Box, dtype: torch.dtype, flat: torch.Tensor, values: torch.Tensor
    ) -> None:
        runs = _run_bytes(box, flat, values) if flat.dtype == dtype else None
        if runs is not None and (box.run >= _GAP or not box.dense or box.outer == 0):
            self._read_runs(file, fd, runs, box.run, _memory(flat))
            return
        for part, where in box.blocks():
            if part.dense:
                raw = torch.empty(part.span, dtype=torch.uint8)
                self._read_runs(file, fd, [(part.start, 0)], part.span, _memory(raw))
                block = torch.as_strided(raw.view(dtype), part.sizes, part.strides)
            else:
                raw = torch.empty(part.nbytes, dtype=torch.uint8)
                runs = zip(part.starts(), range(0, part.nbytes, part.run), strict=True)
                self._read_runs(file, fd, runs, part.run, _memory(raw))
                block = raw.view(dtype).view(part.sizes)
            copy_(values[where].reshape(part.sizes), block)

    def _read_runs(self, file: str, fd: int, runs, size: int, memory: memoryview) -> None:
        """Read runs of `size` bytes; long ones in blocks, by all threads (the kernel copies without Python's lock)."""

        def read(at: int, to: int, n: int) -> None:
            while n:
                got = os.preadv(fd, [memory[to : to + n]], at)
                if not got:
                    raise ValueError(f"{self._root / file} ends at byte {at}; it was truncated while being read")
                at, to, n = at + got, to + got, n - got

        if size <= _BLOCK or self._pool is None:
            for at, to in runs:
                read(at, to, size)
            return
        parts = [(at + k, to + k, min(_BLOCK, size - k)) for at, to in runs for k in range(0, size, _BLOCK)]
        for _ in self._pool.map(lambda part: read(*part), parts):
            pass


class FileWriter:
    """Transport from this process's buffers into the safetensors files of a layout made by `shards`.

    Boxes are written to their place in `.NAME.tmp`; `finish` flushes this process's writes to the disk, `commit` (by
    one process, when all have finished) renames the files and writes the index. Several ranks on one file system may
    write one directory, each with the same layout; moves from other places are skipped. Extra memory: one scratch
    block. `written` counts this process's bytes: summed over ranks it is that of all tensors, or something is missing.
    As a context manager (one process writes all) it checks that and commits, or removes the temporary files on failure.
    """

    def __init__(self, root: str | Path, layout: Layout, sources: Buffers, metadata: Mapping[str, str] | None = None):
        self._root, self._layout = Path(root), layout
        self._sources = sources
        self.written = 0
        self._metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self._specs: dict[str, dict[str, Spec]] = {}
        for place, name in layout.sizes:
            self._specs.setdefault(_file_name(place), {})[name] = layout.tensors[name]
        self._open: dict[str, tuple[int, dict[str, int]]] = {}
        self._root.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        total = sum(spec.nbytes for spec in self._layout.tensors.values())
        if kind is None and self.written == total:
            self.commit()
            return
        self.abort()
        if kind is None:
            raise ValueError(
                f"{self._root}: {self.written} of {total} bytes were written; give the buffers of every place, or "
                "call finish() on every rank and commit() on one instead of using the context manager"
            )

    def _temporary(self, name: str) -> Path:
        return self._root / f".{name}.tmp"

    def _file(self, name: str) -> tuple[int, dict[str, int]]:
        """The temporary file, made at its full size with its header (by every rank alike), and where tensors start."""
        if name not in self._open:
            specs = self._specs[name]
            header = header_bytes(specs, self._metadata)
            starts, at = {}, len(header)
            for tensor in file_order(specs):
                starts[tensor] = at
                at += specs[tensor].nbytes
            fd = os.open(self._temporary(name), os.O_RDWR | os.O_CREAT, 0o644)
            self._open[name] = fd, starts
            os.ftruncate(fd, at)
            _write(fd, memoryview(header), 0)
        return self._open[name]

    def move(self, bucket: Plan) -> None:
        mine = {place for place, _ in self._sources}
        for move in bucket.moves:
            for src, dst in move.pairs():
                if src in mine:
                    fd, starts = self._file(_file_name(dst))
                    spec, flat = bucket.target[move.name], find(self._sources, src, move.at.buffer)
                    box = _Box.of(move.box, move.to, starts[move.to.buffer], spec.itemsize)
                    self._write(fd, box, torch_dtype(spec.dtype), flat, box.arranged(view(flat, move.box, move.at)))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole canonical tensor of the layout, whatever it came from."""
        spec, (piece,) = self._layout.tensors[name], self._layout.pieces[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and the files were laid out for {spec.shape}")
        fd, starts = self._file(_file_name(piece.places[0]))
        box = _Box.of(piece.box, piece.spot(), starts[name], spec.itemsize)
        flat = tensor.detach().contiguous().view(-1)
        values = box.arranged(view(flat, piece.box, piece.spot()))
        self._write(fd, box, torch_dtype(spec.dtype), flat, values)

    def _write(self, fd: int, box: _Box, dtype: torch.dtype, flat: torch.Tensor, values: torch.Tensor) -> None:
        self.written += box.nbytes
        runs = _run_bytes(box, flat, values) if flat.dtype == dtype else None
        if runs is not None:
            memory = _memory(flat)
            for at, there in runs:
                _write(fd, memory[there : there + box.run], at)
            return
        for part, where in box.blocks():
            block = torch.empty(part.sizes, dtype=dtype)
            copy_(block, values[where].reshape(part.sizes))
            memory = _memory(block.view(-1))
            for k, at in enumerate(part.starts()):
                _write(fd, memory[k * part.run : (k + 1) * part.run], at)

    def finish(self) -> None:
        """This process's writes are on the disk."""
        for fd, _ in self._open.values():
            os.fsync(fd)
            os.close(fd)
        self._open.clear()

    def commit(self) -> list[Path]:
        """Give the files their names and write the index; the files, once every rank has finished."""
        for name in self._specs:
            if not self._temporary(name).exists():
                self._file(name)  # of empty tensors only
        self.finish()
        for name in self._specs:
            os.replace(self._temporary(name), self._root / name)
        files = [self._root / name for name in self._specs]
        self._index()
        _fsync_folder(self._root)
        return files

    def abort(self) -> None:
        """Remove the temporary files."""
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()
        for name in self._specs:
            self._temporary(name).unlink(missing_ok=True)

    def _index(self) -> None:
        """The index of several files, as Hugging Face writes it; and away with what would hide the new files."""
        match = _SHARD.fullmatch(next(iter(self._specs)))
        stem = match[1] if match else "model"
        index, single = self._root / f"{stem}.safetensors.index.json", self._root / f"{stem}.safetensors"
        if len(self._specs) == 1:
            index.unlink(missing_ok=True)
            return
        if single.name not in self._specs:
            single.unlink(missing_ok=True)
        weight_map = {name: file for file, specs in self._specs.items() for name in specs}
        total = sum(spec.nbytes for specs in self._specs.values() for spec in specs.values())
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        temporary = self._temporary(index.name)
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(body, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, index)


def _write(fd: int, memory: memoryview, at: int) -> None:
    while memory:
        n = os.pwrite(fd, memory[:_BLOCK], at)
        memory, at = memory[n:], at + n


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
