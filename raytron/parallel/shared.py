"""A Hugging Face directory in shared memory, rewritten in place: how trained weights reach the engines of a node.

One file, `model.safetensors`. Its header is written once; writers and readers map its data, so a push is two copies
(trainer to mapping, mapping to engine) without a system call, and anything that reads Hugging Face directories may read
it. There is one copy a node, not one a worker.

Tensors are cut into *blocks*, runs of rows of about a megabyte, and the file `turns` keeps for each the number of the
push that last changed it. A reader remembers the last push it took, and copies newer blocks only, however many pushes
it missed: a delta needs no agreement on what it is relative to. Both sides go through blocks in the order of the file,
and a reader may follow right behind the writers (`progress`). Checksums are taken of words on their way (`bulk`).

What a push of n bytes costs: a writer reads n and writes n, past the cache, and so does a reader, 4 n in all; a delta
without any change 3 n: the writer reads its own and what is there, the reader what it has. A copy moves 3 n too: lines
are read before they are overwritten. So a push takes 4/3 of a copy at least where both sides share their cores, and 2/3
where each has its own.

Rejected: messages to every engine (a copy each, and nothing for vLLM to read), mapping the engine's own weights (vLLM
has packed them, and an engine would be written to while it runs), a bitmap of changed blocks (cleared when?).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import uuid
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raytron.parallel.boxes import Box, whole
from raytron.parallel.bulk import LATE, TAKE, Bulk, Transfer
from raytron.parallel.checksum import checksum, combine
from raytron.parallel.file_layout import PREFIX, file_layout, file_order, header_bytes, read_header
from raytron.parallel.layout import Layout, Move, Place, Spec, only, owners, plan
from raytron.parallel.pieces import Spot
from raytron.parallel.progress import Progress
from raytron.parallel.storage import Buffers, as_integers, copy_, find, torch_dtype, view

__all__ = ["FILE", "SharedDirectory", "SharedReader", "SharedWeights"]

FILE = "model.safetensors"
BLOCK = 1 << 20  # bytes
_STEM, _TURNS, _PROGRESS, _OWNER = "raytron-weights-", "turns", "progress", "owner"
_NEVER = -1  # the push a reader took last, when it took none: blocks that were never pushed count as of push 0
_FOREVER = 2**62


class SharedDirectory:
    """Makes the directory, and removes it in the end: when closed, when the process exits, or, should that be killed,
    when the next one is made.

    Args:
        tensors: canonical names and what is kept of them; zero at first.
        files: further files by name, such as config.json.
        fallback: where it goes when /dev/shm has no room for it.
        writers: how many will say how far they are (`progress`), so that readers may follow them.

    Attributes:
        path: of the directory; a new name each time.
    """

    def __init__(
        self, tensors: Mapping[str, Spec], files: Mapping[str, bytes], fallback: str | os.PathLike, writers: int = 0
    ) -> None:
        parent = _parent(sum(spec.nbytes for spec in tensors.values()), Path(fallback))
        _sweep(parent)
        made = parent / f".{_STEM}{uuid.uuid4().hex}"
        made.mkdir(mode=0o700, parents=True)
        lock = os.open(made / _OWNER, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.path = str(parent / made.name[1:])
        try:
            for name, data in files.items():
                (made / name).write_bytes(data)
            tensors = {name: tensors[name] for name in file_order(tensors)}
            header = header_bytes(tensors, {"format": "pt"})
            _allocate(made / FILE, header, len(header) + sum(spec.nbytes for spec in tensors.values()))
            _allocate(made / _TURNS, b"", 8 * max(1, sum(_Blocks.of(spec).count for spec in tensors.values())))
            _allocate(made / _PROGRESS, b"", Progress.size(writers, len(tensors)))
            made.rename(self.path)  # with its owner's lock already on it
        except BaseException:
            _remove(str(made), lock)
            raise
        self.close = weakref.finalize(self, _remove, self.path, lock)  # which also runs at exit


def _parent(nbytes: int, fallback: Path) -> Path:
    memory = Path("/dev/shm")
    room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1.1 * nbytes + (64 << 20)
    return memory if room else fallback


def _sweep(parent: Path) -> None:
    """Remove what processes that were killed have left: directories whose owner's lock is free."""
    for left in parent.glob(f"{_STEM}*"):
        try:
            lock = os.open(left / _OWNER, os.O_RDWR)
        except OSError:  # somebody else's, or being removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
        else:
            _remove(str(left), lock)


def _remove(path: str, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _allocate(file: Path, head: bytes, size: int) -> None:
    """A file of that size whose memory is there: a full file system says so now, and not by a signal later."""
    with open(file, "wb") as out:
        os.posix_fallocate(out.fileno(), 0, size)
        out.write(head)


class _Blocks:
    """How a tensor is cut: blocks of `rows` rows (indices of its first dimension), `count` of them."""

    def __init__(self, rows: int, count: int) -> None:
        self.rows, self.count = rows, count

    @classmethod
    def of(cls, spec: Spec) -> _Blocks:
        if not spec.shape or not spec.numel:
            return cls(1, 1)
        rows = max(1, BLOCK * spec.shape[0] // spec.nbytes)
        return cls(rows, -(-spec.shape[0] // rows))

    def across(self, box: Box) -> Iterator[tuple[int, Box]]:
        """(number, part of the box) of the blocks that a box meets."""
        if not box:
            yield 0, box
            return
        lo, hi = box[0]
        for number in range(lo // self.rows, -(-hi // self.rows)):
            at = number * self.rows
            yield number, ((max(at, lo), min(at + self.rows, hi)), *box[1:])


class SharedWeights:
    """The directory's tensors, mapped into this process.

    Attributes:
        specs: canonical name -> Spec. layout: of the file, version 0. flat: name -> its elements, 1-D, in C order.
        turns: int64, for every block of all tensors the number of the push that last changed it.
        progress: of the writers.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        file, header = Path(path) / FILE, read_header(Path(path) / FILE)
        self.path, self.specs, self.layout = os.fspath(path), header.specs, file_layout(file)
        data = torch.frombuffer(_mapped(file), dtype=torch.uint8)
        self.flat = {
            name: data[start : start + spec.nbytes].view(torch_dtype(spec.dtype))
            for (name, spec), start in zip(header.specs.items(), header.starts.values(), strict=True)
        }
        self.turns = np.frombuffer(_mapped(Path(path) / _TURNS), dtype=np.int64)
        self._blocks = {name: _Blocks.of(spec) for name, spec in header.specs.items()}
        ends = np.cumsum([blocks.count for blocks in self._blocks.values()])
        self._first = dict(zip(self._blocks, [0, *ends.tolist()], strict=False))
        self.progress = Progress(_mapped(Path(path) / _PROGRESS), list(self.specs), int(ends[-1]) if len(ends) else 0)
        self._summing: Bulk | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def place(self) -> Place:
        """The name of the file in `layout`."""
        return PREFIX + FILE

    def blocks(self, name: str, box: Box) -> Iterator[tuple[int, Box]]:
        """(index into `turns`, part of the box) of the blocks that a box of a tensor meets."""
        first = self._first[name]
        return ((first + number, part) for number, part in self._blocks[name].across(box))

    def part(self, name: str, box: Box) -> Tensor:
        """A view of some of a tensor."""
        spec = self.specs[name]
        strides = _strides(spec.shape)
        return view(
            self.flat[name], box, Spot(name, sum(lo * s for (lo, _), s in zip(box, strides, strict=True)), strides)
        )

    def write(self, name: str, box: Box, values: Tensor, turn: int, delta: bool = False) -> int:
        """Put a box's values in, as push number `turn`; their checksum, of what was given and not of what is there.

        values: [box], of any dtype; cast to the tensor's. delta: blocks that hold them already stay as they are.
        """
        spec, total = self.specs[name], 0
        dtype = torch_dtype(spec.dtype)
        for block, part in self.blocks(name, box):
            old, new = self.part(name, part), _rows(values, part, box).to("cpu", dtype)
            if not (delta and same_bits(old, new)):
                copy_(old, new)
                self.turns[block] = turn
            total += checksum(new, part, spec.shape)
        return total

    def bulk(self, transfers: Sequence[Transfer]) -> Bulk:
        """Transfers to or from this directory, to be made all at once."""
        return Bulk(transfers, self.blocks, self.turns)

    def put(self, name: str, box: Box, index: np.ndarray, values: Tensor, turn: int) -> None:
        """Put single elements in. index int64 [n]: of each in the box, counted in C order. values [n]: the tensor's."""
        spec = self.specs[name]
        sizes = [hi - lo for lo, hi in box]
        at = np.unravel_index(index, sizes) if box else ()
        at = [i + lo for i, (lo, _) in zip(at, box, strict=True)]
        flat = np.ravel_multi_index(at, spec.shape) if box else np.zeros(len(index), np.int64)
        as_integers(self.flat[name]).numpy()[flat] = as_integers(values).numpy()
        rows = np.unique(at[0] // self._blocks[name].rows) if box else np.zeros(1, np.int64)
        self.turns[self._first[name] + rows] = turn

    def checksums(self) -> dict[str, int]:
        """Of all tensors as they are now."""
        if self._summing is None:
            boxes = {name: whole(spec.shape) for name, spec in self.specs.items()}
            parts = {name: self.part(name, box) for name, box in boxes.items()}
            self._summing = self.bulk([Transfer(n, boxes[n], self.specs[n].shape, p, p) for n, p in parts.items()])
        sums = dict(self._summing.run(TAKE, _FOREVER).sums)  # takes nothing: no block is of a later push
        return sums | {transfer.name: self._checksum(transfer.name) for transfer in self._summing.rest}

    def _checksum(self, name: str) -> int:
        shape = self.specs[name].shape
        parts = (checksum(self.part(name, part), part, shape) for _, part in self.blocks(name, whole(shape)))
        return combine({name: part} for part in parts).get(name, 0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal in every bit."""
    return torch.equal(as_integers(a), as_integers(b).to(a.device))


def _rows(values: Tensor, part: Box, box: Box) -> Tensor:
    """The rows of a box's values that are of a block's part of it."""
    return values[part[0][0] - box[0][0] : part[0][1] - box[0][0]] if box else values


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _mapped(file: Path) -> mmap.mmap:
    """The file's memory, all pages of it at hand."""
    with open(file, "r+b") as opened:
        return mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


class SharedReader:
    """One rank's way from the mapping into its own buffers, planned once.

    Args:
        layout: where all ranks of the reader hold the tensors. place: this rank's. buffers: this rank's.
        frozen: tensors that no push changes after the first; once taken they are neither copied nor summed up again.

    Raises:
        ValueError: the directory lacks a tensor, or has it in another shape or dtype; names it.
    """

    def __init__(
        self, path: str, layout: Layout, place: Place, buffers: Buffers, frozen: Collection[str] = frozenset()
    ) -> None:
        self.shared = SharedWeights(path)
        self._place, self._turn = place, _NEVER
        for name, spec in layout.tensors.items():
            if (theirs := self.shared.specs.get(name)) is not None and theirs.dtype != spec.dtype:
                raise ValueError(f"{name} is {spec.dtype} here and {theirs.dtype} in {path}; give both one dtype")
        owned = plan(self.shared.layout, only(owners(layout), places=[place])).moves
        boxes = {(move.name, move.box) for move in owned}
        held = plan(self.shared.layout, only(layout, places=[place])).moves
        moves = [(move, True) for move in owned] + [(m, False) for m in held if (m.name, m.box) not in boxes]
        parts: tuple[list[Transfer], list[Transfer]] = [], []
        for move, summed in moves:
            parts[move.name in frozen].append(self._transfer(move, buffers, summed))
        self._changing, self._frozen = map(self.shared.bulk, parts)
        self._frozen_sums: list[tuple[str, int]] = []

    def _transfer(self, move: Move, buffers: Buffers, summed: bool) -> Transfer:
        to = view(find(buffers, self._place, move.to.buffer), move.box, move.to)
        shape = self.shared.specs[move.name].shape
        return Transfer(move.name, move.box, shape, to, self.shared.part(move.name, move.box), summed)

    def take(self, turn: int | None) -> dict[str, int]:
        """Copy what pushes have changed since the last time, up to `turn`; checksums of what is held now.

        A sum is of this rank's share: what several ranks hold counts on one, and is compared bit by bit on the others.
        Of frozen tensors that were taken before it is the sum of then. turn: None copies nothing and sums up all. A
        push that is still being written is followed, block by block.

        Raises:
            ValueError: such a copy differs; names the tensor.
            WriterGone: the push was not finished; what is held is a mixture, and the next one is taken whole.
        """
        since = _FOREVER if turn is None else self._turn
        if turn is not None:
            self._turn = _NEVER  # until all of it has come
        sums = self._run(self._changing, since, turn)
        if turn is None or since == _NEVER:
            self._frozen_sums = self._run(self._frozen, since, turn)
        if turn is not None:
            self._turn = turn
        return combine({name: value} for name, value in (*sums, *self._frozen_sums))

    def _run(self, bulk: Bulk, since: int, turn: int | None) -> list[tuple[str, int]]:
        progress = self.shared.progress
        sums, different, status = bulk.run(TAKE, since, None if turn is None else progress.taking(turn))
        if status:
            raise progress.gone(turn, late=status == LATE)
        for transfer in bulk.rest:
            self._take(transfer, since, turn, sums, different)
        if different:
            raise ValueError(f"{different[0]}: {self._place} holds other values than were pushed")
        return sums

    def forget(self) -> None:
        """What is held has been changed by others: copy everything the next time."""
        self._turn = _NEVER

    def _take(
        self, transfer: Transfer, since: int, turn: int | None, sums: list[tuple[str, int]], different: list[str]
    ) -> None:
        name, box, shape = transfer.name, transfer.box, transfer.shape
        for block, part in self.shared.blocks(name, box):
            mine, theirs = _rows(transfer.to, part, box), _rows(transfer.source, part, box)
            if turn is not None:
                self.shared.progress.wait(turn, block + 1)
            if self.shared.turns[block] > since:
                copy_(mine, theirs)
            if transfer.summed:
                sums.append((name, checksum(mine, part, shape)))
            elif not same_bits(mine, theirs):
                different.append(name)
