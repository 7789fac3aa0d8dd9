"""Writing safetensors files front to back, with their digests.

The header of a safetensors file needs only names, dtypes and shapes, so it goes first and tensors follow as they
arrive: nothing is gathered in memory, and object stores, which only append, are served alike. One rank writes a whole
file, so its digest costs no second pass; several ranks writing boxes of one file (`parallel/files.py`) can't have that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from raytron.checkpoint.digest import CHUNK, Digest, Entry, Scratch, digest_of
from raytron.checkpoint.storage import FileWriter, Storage
from raytron.parallel.file_layout import file_order, header_bytes, shards
from raytron.parallel.layout import Layout, Place, Plan, Spec, plan
from raytron.parallel.storage import Buffers, torch_dtype

__all__ = ["Export", "Fill", "Sink", "Written", "export", "header", "write_export", "write_files"]

_ALIGN = 16  # bytes; every staged tensor starts where any dtype may be viewed
_BUCKET = 256 << 20

Fill = Callable[[Plan, Buffers], None]
"""Carries out this rank's part of a bucket: its moves into the given buffers (and what others need from it)."""


@dataclass
class Written:
    """What one rank wrote: entries by path, and what went wrong first."""

    entries: dict[str, Entry]
    error: str | None = None

    def add(self, sink: Sink) -> None:
        entry = sink.close()
        if entry is not None:
            self.entries[sink.path] = entry
        self.error = self.error or sink.error


def header(tensors: Mapping[str, Spec]) -> bytes:
    """The first bytes of a safetensors file that holds `tensors`, widest dtypes first, else in this order."""
    return header_bytes(tensors, {"format": "pt"})


class Sink:
    """A file being written, hashed on the way.

    The first `OSError` (disk full, permission) ends the file but not the caller: a save is collective, so a rank that
    can't write still has to send others their bytes. `error` then names the file and the cause, and further bytes are
    dropped.
    """

    def __init__(self, storage: Storage, path: str, pool: ThreadPoolExecutor) -> None:
        self.path, self.error = path, None
        self._name, self._digest = f"{storage}/{path}", Digest(pool)
        self._file: FileWriter | None = None
        try:
            self._file = storage.writer(path)
        except OSError as error:
            self._fail(error)

    def write(self, data: bytes | torch.Tensor) -> None:
        """Append bytes, or a contiguous tensor's elements."""
        if isinstance(data, torch.Tensor):
            flat = data.reshape(-1).view(torch.uint8)
            step = flat.numel() if flat.device.type == "cpu" else 16 * CHUNK
            for part in flat.split(step) if flat.numel() else ():
                self._append(memoryview(part.cpu().numpy()))
        else:
            self._append(memoryview(data))

    def _append(self, view: memoryview) -> None:
        for at in range(0, len(view), CHUNK):
            if self.error is not None:
                break
            part = view[at : at + CHUNK]
            self._digest.update(part)
            try:
                self._file.write(part)
            except OSError as error:
                self._fail(error)
        self._digest.settle()  # the caller may overwrite its bytes now

    def close(self) -> Entry | None:
        """Make the file durable; its entry, or None when there was an error."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._fail(error)
            self._file = None
        return self._digest.entry() if self.error is None else None

    def _fail(self, error: OSError) -> None:
        if self.error is None:
            self.error = f"{self._name}: {error.strerror or error}"


def write_files(storage: Storage, files: Mapping[str, bytes]) -> Written:
    """Small files, one after the other; stops at the first that fails."""
    written = Written({})
    for path, data in files.items():
        try:
            storage.write(path, data)
        except OSError as error:
            written.error = f"{storage}/{path}: {error.strerror or error}"
            break
        written.entries[path] = digest_of(data)
    return written


# Weights as Hugging Face files


@dataclass(frozen=True)
class Export:
    """How sharded tensors become files: pure, the same on every rank.

    target: layout of the files; place "file:NAME" has one buffer per tensor.
    writers: file place -> the rank that writes it.
    plan: moves to `target`, in an order that keeps all writers busy.
    bucket: bytes per bucket of the plan; with single tensors above it, extra memory stays within twice the largest.
    """

    target: Layout
    writers: Mapping[Place, int]
    plan: Plan
    bucket: int

    @property
    def files(self) -> dict[Place, dict[str, Spec]]:
        """The tensors of each file in the order of its bytes."""
        files: dict[Place, dict[str, Spec]] = {place: {} for place in self.writers}
        for place, name in self.target.sizes:
            files[place][name] = self.target.tensors[name]
        return {place: {name: specs[name] for name in file_order(specs)} for place, specs in files.items()}


def export(
    source: Layout, ranks: Mapping[Place, int], *, dtype: torch.dtype | None, max_bytes: int, stem: str = "model"
) -> Export:
    """Plan the files of `source`'s tensors, at most `max_bytes` of data each (a larger tensor has its own).

    ranks: the rank that can write for each place of the source. dtype: of floating tensors of two bytes and more (None:
    as they are). stem: of the files' names.
    """
    specs = {name: _cast(spec, dtype) for name, spec in source.tensors.items()}
    target = shards(specs, max_bytes, stem, version=source.version)
    writers = _writers(source, target, ranks)
    draft = Export(target, writers, Plan((), {}, {}), 0)
    order = _interleaved(draft.files, writers)
    ordered = replace(target, tensors={name: specs[name] for name in order})
    largest = max((spec.nbytes for spec in specs.values()), default=0)
    return replace(draft, plan=plan(source, ordered), bucket=max(1, min(_BUCKET, largest // 2)))


def _cast(spec: Spec, dtype: torch.dtype | None) -> Spec:
    floating = torch_dtype(spec.dtype).is_floating_point and spec.itemsize > 1
    return replace(spec, dtype=str(dtype).removeprefix("torch.")) if dtype is not None and floating else spec


def _writers(source: Layout, target: Layout, ranks: Mapping[Place, int]) -> dict[Place, int]:
    """The least loaded rank for each file, of those the one that holds the file's first tensor."""
    load = dict.fromkeys(sorted(ranks.values()), 0)
    nbytes: dict[Place, int] = {}
    first: dict[Place, str] = {}
    for place, name in target.sizes:
        nbytes[place] = nbytes.get(place, 0) + target.tensors[name].nbytes
        first.setdefault(place, name)
    writers: dict[Place, int] = {}
    for place, size in nbytes.items():
        held = {ranks[p] for piece in source.pieces.get(first[place], ()) for p in piece.places if p in ranks}
        rank = min(load, key=lambda r: (load[r], r not in held, r))
        writers[place], load[rank] = rank, load[rank] + size
    return writers


def _interleaved(files: Mapping[Place, Mapping[str, Spec]], writers: Mapping[Place, int]) -> list[str]:
    """Tensor names so that every writer's stream is in the order of its files and all advance together."""
    streams: dict[int, int] = dict.fromkeys(writers.values(), 0)
    keyed: list[tuple[int, int, str]] = []
    for place, tensors in files.items():
        for name, spec in tensors.items():
            rank = writers[place]
            keyed.append((streams[rank], rank, name))
            streams[rank] += spec.nbytes
    return [name for *_, name in sorted(keyed, key=lambda key: key[:2])]


def write_export(job: Export, rank: int, fill: Fill, storage: Storage, device: torch.device | str = "cpu") -> Written:
    """Stream the files that `rank` writes; collective over all ranks of the export (each calls `fill` per bucket)."""
    written, scratch = Written({}), Scratch(device)
    with ThreadPoolExecutor(1, "checkpoint-digest") as pool:
        stream = _Stream(job, rank, storage, pool, written)
        for bucket in job.plan.buckets(job.bucket):
            names = dict.fromkeys(move.name for move in bucket.moves)
            staged = _stage(stream.mine(names), scratch)
            fill(bucket, {(place, name): tensor for place, name, tensor in staged})
            for place, name, tensor in staged:
                stream.write(place, name, tensor)
        stream.close()
    return written


def _stage(wanted: Iterable[tuple[Place, str, Spec]], scratch: Scratch) -> list[tuple[Place, str, torch.Tensor]]:
    """A flat tensor for each, side by side in the scratch memory."""
    wanted, spans, total = list(wanted), [], 0
    for _, _, spec in wanted:
        spans.append((total, total + spec.nbytes))
        total += -(-spec.nbytes // _ALIGN) * _ALIGN
    memory = scratch.take(total)
    return [
        (place, name, memory[a:b].view(torch_dtype(spec.dtype)))
        for (place, name, spec), (a, b) in zip(wanted, spans, strict=True)
    ]


class _Stream:
    """One writer's files, one after the other."""

    def __init__(self, job: Export, rank: int, storage: Storage, pool: ThreadPoolExecutor, written: Written) -> None:
        self._files = {place: tensors for place, tensors in job.files.items() if job.writers[place] == rank}
        self._place_of = {name: place for place, tensors in self._files.items() for name in tensors}
        self._storage, self._pool, self._written = storage, pool, written
        self._at: Place | None = None
        self._sink: Sink | None = None

    def mine(self, names: Iterable[str]) -> list[tuple[Place, str, Spec]]:
        """(place, name, spec) of those that this rank writes."""
        found = ((self._place_of.get(name), name) for name in names)
        return [(place, name, self._files[place][name]) for place, name in found if place is not None]

    def write(self, place: Place, name: str, tensor: torch.Tensor) -> None:
        if place != self._at:
            self._open(place)
        self._sink.write(tensor)

    def _open(self, place: Place) -> None:
        self.close()
        self._at, self._sink = place, Sink(self._storage, place.removeprefix("file:"), self._pool)
        self._sink.write(header(self._files[place]))

    def close(self) -> None:
        if self._sink is not None:
            self._written.add(self._sink)
            self._sink = None
