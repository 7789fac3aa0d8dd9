"""Reading a checkpoint's files into place, each byte once, verified on the way.

A plan from files to a rank's flat buffers becomes, file by file, a list of copies in file order. Runs of copies that
are contiguous on both sides (a shard read back on the layout that wrote it) merge into plain reads straight into the
buffer; others are staged one box at a time, so that extra memory is one tensor at most. A file that this rank is to
verify is read from first to last byte and hashed on the way, in the same pass that fills the buffers.

Memory-mapping the files was the alternative: it faults page by page, holds no error other than a signal, and does not
exist for remote storage.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from raytron.checkpoint.digest import Digest, Entry, Scratch
from raytron.checkpoint.storage import DamagedFile, FileReader, Storage
from raytron.parallel import file_layout
from raytron.parallel.boxes import extent, terms, whole
from raytron.parallel.file_layout import Header
from raytron.parallel.layout import Layout, Piece, Place, Plan, Spec
from raytron.parallel.storage import Buffers, torch_dtype

__all__ = [
    "Copy",
    "Files",
    "Region",
    "Regions",
    "by_path",
    "copies",
    "read",
    "read_header",
    "tensor_files",
    "weight_files",
]

_FILES_AT_ONCE = 2
_MAX_HEADER = 100_000_000  # the safetensors library's own limit


class Region(NamedTuple):
    """Where a flat buffer lies inside a file: its first byte and the dtype of its elements."""

    path: str
    start: int
    dtype: torch.dtype


Regions = Mapping[tuple[Place, str], Region]


class Files(NamedTuple):
    """Tensors that files hold: their layout (places are "file:PATH") and where its buffers lie."""

    layout: Layout
    regions: Regions


def read_header(storage: Storage, path: str) -> Header:
    """The safetensors header of a file. Raises `DamagedFile` when it is missing, truncated or no safetensors file."""
    size = storage.size(path)
    if size is None:
        raise DamagedFile(f"{storage}/{path}: missing")
    length = int.from_bytes(storage.read(path, 0, min(8, size)), "little")
    # The parser wants a local file: one of the same size, of which only the header takes space.
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(storage.read(path, 0, min(size, 8 + length, _MAX_HEADER)))
        copy.truncate(size)
        copy.flush()
        try:
            return file_layout.read_header(copy.name)
        except ValueError as error:
            raise DamagedFile(str(error).replace(copy.name, f"{storage}/{path}")) from None


def weight_files(storage: Storage, version: int = 0) -> Files:
    """The tensors of a Hugging Face directory: `model.safetensors`, or the files its index names."""
    index = "model.safetensors.index.json"
    if storage.size("model.safetensors") is not None:
        return tensor_files(storage, ["model.safetensors"], version)
    if storage.size(index) is None:
        raise ValueError(f"{storage} holds no model.safetensors and no {index}; give a Hugging Face directory with one")
    try:
        paths = sorted(set(json.loads(storage.read(index))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{storage}/{index}: can't be read ({error!r})") from error
    return tensor_files(storage, paths, version)


def tensor_files(storage: Storage, paths: Iterable[str], version: int = 0) -> Files:
    """The tensors of some safetensors files, in the order of the files."""
    specs: dict[str, Spec] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    sizes: dict[tuple[Place, str], int] = {}
    regions: dict[tuple[Place, str], Region] = {}
    for path in paths:
        place, header = f"file:{path}", read_header(storage, path)
        for name, spec in header.specs.items():
            specs[name], sizes[place, name] = spec, spec.numel
            if spec.numel:
                pieces[name] = (Piece(spec.box, name, 0, c_strides(spec.shape), (place,)),)
            regions[place, name] = Region(path, header.starts[name], torch_dtype(spec.dtype))
    return Files(Layout(version, specs, pieces, sizes), regions)


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one index to the next in each dimension of a contiguous tensor."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


@dataclass(frozen=True, slots=True)
class Copy:
    """A strided box of a file's elements, and where it goes in a flat target tensor."""

    start: int  # byte of its first element in the file
    dtype: torch.dtype  # in the file
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in the file, in elements
    target: torch.Tensor  # flat
    offset: int  # in the target, in elements, likewise
    target_strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """One past its last byte in the file."""
        return self.start + extent(whole(self.sizes), self.strides) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of its elements in the file."""
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        return len(self.sizes) == 1 and self.strides == self.target_strides == (1,)

    def flattened(self) -> Copy:
        """Itself as one run of elements, where both sides store the box densely and in the same order."""
        n = math.prod(self.sizes)
        dense = terms(whole(self.sizes), self.strides) == (((1, n),) if n > 1 else ())
        if dense and all(
            n == 1 or a == b for n, a, b in zip(self.sizes, self.strides, self.target_strides, strict=True)
        ):
            return replace(self, sizes=(n,), strides=(1,), target_strides=(1,))
        return self


def copies(plan: Plan, regions: Regions, targets: Buffers) -> Iterator[tuple[str, Copy]]:
    """(path, copy) of the moves of `plan` from files into the places and buffers that are in `targets`."""
    for move in plan.moves:
        sizes = tuple(hi - lo for lo, hi in move.box)
        for source, to in move.pairs():
            target = targets.get((to, move.to.buffer))
            if target is not None:
                region = regions[source, move.at.buffer]
                start = region.start + move.at.offset * region.dtype.itemsize
                copy = Copy(start, region.dtype, sizes, move.at.strides, target, move.to.offset, move.to.strides)
                yield region.path, copy


def by_path(found: Iterable[tuple[str, Copy]]) -> dict[str, list[Copy]]:
    """The copies of each file."""
    out: dict[str, list[Copy]] = {}
    for path, copy in found:
        out.setdefault(path, []).append(copy)
    return out


def read(storage: Storage, wanted: Mapping[str, Sequence[Copy]], verify: Mapping[str, Entry]) -> None:
    """Carry out the copies of each file, and read those of `verify` whole against their entries.

    Two files at a time, each read and hashed by one thread; extra memory is a staged box for each.
    Raises `DamagedFile` naming a file that is missing, truncated, or not what its entry says. Targets may be partly
    written then.
    """
    paths = dict.fromkeys([*wanted, *verify])
    with ThreadPoolExecutor(_FILES_AT_ONCE, "checkpoint-read") as pool:
        for _ in pool.map(lambda path: _read_file(storage, path, wanted.get(path, ()), verify.get(path)), paths):
            pass


def _read_file(storage: Storage, path: str, wanted: Sequence[Copy], entry: Entry | None) -> None:
    name = f"{storage}/{path}"
    if entry is not None and (size := storage.size(path)) != entry.nbytes:
        raise DamagedFile(f"{name}: " + ("missing" if size is None else f"has {size} bytes instead of {entry.nbytes}"))
    file = storage.reader(path)
    try:
        digest = None if entry is None else Digest()
        window = _Window(file, digest, Scratch())
        for group in _groups(wanted):
            window.fill(group)
        if entry is None:
            return
        window.skip(entry.nbytes)
        if digest.entry() != entry:
            raise DamagedFile(f"{name}: its bytes are not those that were written (xxh3 differs)")
    finally:
        file.close()


def _groups(wanted: Sequence[Copy]) -> Iterator[list[Copy]]:
    """Copies in file order, neighbouring runs merged, those whose spans overlap together."""
    group: list[Copy] = []
    end = 0
    for copy in _merged(wanted):
        if group and copy.start >= end:
            yield group
            group = []
        group.append(copy)
        end = max(end, copy.end)
    if group:
        yield group


def _merged(wanted: Sequence[Copy]) -> Iterator[Copy]:
    last: Copy | None = None
    for copy in sorted((c.flattened() for c in wanted), key=lambda c: c.start):
        if last is not None and _adjoin(last, copy):
            last = replace(last, sizes=(last.sizes[0] + copy.sizes[0],))
            continue
        if last is not None:
            yield last
        last = copy
    if last is not None:
        yield last


def _adjoin(a: Copy, b: Copy) -> bool:
    return (
        a.contiguous
        and b.contiguous
        and a.target is b.target
        and a.dtype == b.dtype
        and a.end == b.start
        and a.offset + a.sizes[0] == b.offset
    )


class _Window:
    """An open file read forwards; with a digest, every byte from the first on."""

    def __init__(self, file: FileReader, digest: Digest | None, scratch: Scratch) -> None:
        self._file, self._digest, self._scratch, self._at = file, digest, scratch, 0

    def skip(self, to: int) -> None:
        """Go to byte `to`; what lies between is only hashed."""
        while self._digest is not None and self._at < to:
            self._stage(self._at, min(self._file.chunk, to - self._at))
        self._at = to

    def fill(self, group: Sequence[Copy]) -> None:
        self.skip(group[0].start)
        if len(group) == 1 and group[0].contiguous:
            self._fill_run(group[0])
            return
        start, end = group[0].start, max(copy.end for copy in group)
        staged = self._stage(start, end - start)
        for copy in group:
            at = copy.start - start
            source = staged[at : at + (end - copy.start) // copy.dtype.itemsize * copy.dtype.itemsize]
            if at % copy.dtype.itemsize:
                source = source.clone()
            source = source.view(copy.dtype).as_strided(copy.sizes, copy.strides)
            offset = copy.target.storage_offset() + copy.offset
            copy.target.as_strided(copy.sizes, copy.target_strides, offset).copy_(source)

    def _fill_run(self, copy: Copy) -> None:
        target, chunk = copy.target[copy.offset : copy.offset + copy.sizes[0]], self._file.chunk
        if target.dtype == copy.dtype and target.device.type == "cpu":
            self._read(copy.start, memoryview(target.view(torch.uint8).numpy()))
            return
        for i, part in enumerate(target.split(chunk // copy.dtype.itemsize)):
            at = copy.start + i * chunk
            part.copy_(self._stage(at, part.numel() * copy.dtype.itemsize).view(copy.dtype))

    def _stage(self, start: int, nbytes: int) -> torch.Tensor:
        staged = self._scratch.take(nbytes)
        self._read(start, memoryview(staged.numpy()))
        return staged

    def _read(self, start: int, view: memoryview) -> None:
        for at in range(0, len(view), self._file.chunk):
            part = view[at : at + self._file.chunk]
            self._file.read_into(start + at, part)
            if self._digest is not None:
                self._digest.update(part)
        self._at = start + len(view)
