"""Optimizer state on disk: each rank's flat shard as it is, and one layout that says what lies where.

A shard file holds one flat tensor per optimizer buffer (`exp_avg`, `exp_avg_sq`, `master`), written and read back
front to back, so a resume on the same layout is a plain contiguous read. `layout.json` is the layout algebra's own
layout with files as places; any other TP, PP or DP is a plan from it. Saving canonical tensors instead (as for weights)
would gather and cut again for every save, for files that nothing but raytron reads.

Places that hold exactly the same pieces (data-parallel replicas without ZeRO) share one file, written by the first.
What only tensor-parallel neighbours share (norms) is a part of each one's shard: under one in a thousand of the bytes,
and leaving it out would cut every shard into fragments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from raytron.checkpoint.reading import Copy, Region, Regions, copies, read_header
from raytron.checkpoint.storage import DamagedFile, Storage
from raytron.checkpoint.writing import Sink, Written, header, write_files
from raytron.parallel.file_layout import Header, file_order
from raytron.parallel.layout import Layout, Piece, Place, Spec, only, plan, relabel
from raytron.parallel.storage import torch_dtype

__all__ = ["State", "decode_layout", "encode_layout", "shard_files", "write_state"]

LAYOUT = "layout.json"
BUFFER = "shard"
_FORMAT = 1


def shard_files(layout: Layout) -> dict[Place, str]:
    """The file of each place that holds pieces: one per set of places that hold exactly the same."""
    held: dict[Place, list[tuple[str, int]]] = {}
    for name in layout.tensors:
        for i, piece in enumerate(layout.pieces.get(name, ())):
            for place in piece.places:
                held.setdefault(place, []).append((name, i))
    number: dict[tuple, int] = {}
    order = [place for place in layout.places if place in held]
    return {place: f"shard-{number.setdefault(tuple(held[place]), len(number)):05d}.safetensors" for place in order}


def writer_of(files: Mapping[Place, str]) -> dict[str, Place]:
    """The first place of each file, which writes it."""
    return {path: place for place, path in reversed(files.items())}


def on_disk(layout: Layout, files: Mapping[Place, str]) -> Layout:
    """The layout of the shard files (places "file:NAME")."""
    writers = writer_of(files)
    kept = only(layout, places=writers.values())
    return relabel(kept, {place: f"file:{path}" for path, place in writers.items()})


def write_state(
    storage: Storage, layout: Layout, files: Mapping[Place, str], place: Place, buffers: Mapping[str, torch.Tensor]
) -> Written:
    """What `place` writes of the state: its shard, unless another place writes the same; the first also the layout.

    layout: of all places, buffer "shard". buffers: name -> this place's flat tensor, each of that layout.
    """
    written = Written({})
    path = files.get(place)
    if buffers and path is not None and writer_of(files)[path] == place:
        if path == min(files.values()):
            written = write_files(storage, {LAYOUT: encode_layout(on_disk(layout, files))})
        _write_shard(storage, path, buffers, written)
    return written


def _write_shard(storage: Storage, path: str, buffers: Mapping[str, torch.Tensor], written: Written) -> None:
    specs = {name: Spec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in buffers.items()}
    with ThreadPoolExecutor(1, "checkpoint-digest") as pool:
        sink = Sink(storage, path, pool)
        sink.write(header(specs))
        for name in file_order(specs):
            sink.write(buffers[name])
        written.add(sink)


# The layout as JSON


def encode_layout(layout: Layout) -> bytes:
    """Compact JSON: places, buffers and sets of places by number, a piece as one flat list of integers."""
    places = list(layout.places)
    number = {place: i for i, place in enumerate(places)}
    sets: dict[tuple[Place, ...], int] = {}
    pieces: dict[str, list[list]] = {}
    for name, piece in layout:
        of = sets.setdefault(piece.places, len(sets))
        flat = [n for bounds in piece.box for n in bounds]
        pieces.setdefault(name, []).append([of, piece.buffer, piece.offset, *flat, *piece.strides])
    body = {
        "format": _FORMAT,
        "version": layout.version,
        "places": places,
        "sets": [[number[place] for place in some] for some in sets],
        "sizes": [[number[place], buffer, n] for (place, buffer), n in layout.sizes.items()],
        "tensors": {name: [spec.dtype, spec.shape, spec.grain] for name, spec in layout.tensors.items()},
        "pieces": pieces,
    }
    return json.dumps(body, separators=(",", ":")).encode()


def decode_layout(data: bytes) -> Layout:
    """The layout that `encode_layout` wrote. Raises `ValueError` for another format."""
    body = json.loads(data)
    if body["format"] != _FORMAT:
        raise ValueError(f"a layout of format {body['format']}; this raytron reads {_FORMAT}")
    places = body["places"]
    sets = [tuple(places[i] for i in some) for some in body["sets"]]
    tensors = {name: Spec(tuple(shape), dtype, tuple(grain)) for name, (dtype, shape, grain) in body["tensors"].items()}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name, rows in body["pieces"].items():
        ndim = len(tensors[name].shape)
        pieces[name] = tuple(_decode_piece(row, ndim, sets) for row in rows)
    sizes = {(places[i], buffer): n for i, buffer, n in body["sizes"]}
    return Layout(body["version"], tensors, pieces, sizes)


def _decode_piece(row: list, ndim: int, sets: list[tuple[Place, ...]]) -> Piece:
    of, buffer, offset, *rest = row
    box = tuple((rest[2 * d], rest[2 * d + 1]) for d in range(ndim))
    return Piece(box, buffer, offset, tuple(rest[2 * ndim :]), sets[of])


# Reading


class State:
    """The optimizer state in a checkpoint's `state/` folder."""

    def __init__(self, storage: Storage, version: int) -> None:
        self._storage = storage
        try:
            stored = decode_layout(storage.read(LAYOUT))
        except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise DamagedFile(f"{storage}/{LAYOUT}: can't be read ({error!r})") from error
        self.layout = Layout(version, stored.tensors, stored.pieces, stored.sizes)
        self._headers: dict[str, Header] = {}
        self.buffers = tuple(self._header(self.paths[0]).specs)

    @property
    def paths(self) -> list[str]:
        return [place.removeprefix("file:") for place in self.layout.places]

    def _header(self, path: str) -> Header:
        if path not in self._headers:
            self._headers[path] = read_header(self._storage, path)
        return self._headers[path]

    def copies(self, target: Layout, place: Place, buffers: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Copy]]:
        """(path, copy) that fill `buffers` (name -> flat tensor of `place` in `target`, each its buffer "shard")."""
        missing = [name for name in buffers if name not in self.buffers]
        if missing:
            raise ValueError(
                f"{self._storage}: the state has {', '.join(self.buffers)} but not {missing[0]}, which this optimizer "
                "needs; resume with the optimizer that saved it"
            )
        mine = only(target, places=[place])
        twin = self._twin(mine)
        moves = plan(self.layout, mine) if twin is None else None
        for name, tensor in buffers.items():
            if twin is not None:
                yield twin, self._whole(twin, name, tensor)
            else:
                yield from copies(moves, self.regions(name), {(place, BUFFER): tensor})

    def region(self, path: str, name: str) -> Region:
        """Where buffer `name` lies in a file."""
        header = self._header(path)
        if name not in header.specs:
            raise DamagedFile(f"{self._storage}/{path}: lacks {name}, which other shards have")
        return Region(path, header.starts[name], torch_dtype(header.specs[name].dtype))

    def _whole(self, path: str, name: str, tensor: torch.Tensor) -> Copy:
        region = self.region(path, name)
        return Copy(region.start, region.dtype, (tensor.numel(),), (1,), tensor, 0, (1,))

    def _twin(self, mine: Layout) -> str | None:
        """The file whose shard is laid out exactly as this place's, if there is one."""
        wanted = _arrangement(mine)
        first = next((piece for _, piece in mine), None)
        name = next((name for name, _ in mine), None)
        for piece in self.layout.pieces.get(name, ()):
            if (piece.box, piece.spot()) == (first.box, first.spot()):
                for place in piece.places:
                    if _arrangement(only(self.layout, places=[place])) == wanted:
                        return place.removeprefix("file:")
        return None

    def regions(self, name: str) -> Regions:
        """Where buffer `name` lies in each file; headers are read as they are asked for."""
        return _Regions(self, name)


class _Regions(Mapping):
    """The regions of one buffer in a state's files."""

    def __init__(self, state: State, name: str) -> None:
        self._state, self._name = state, name

    def __getitem__(self, key: tuple[Place, str]) -> Region:
        return self._state.region(key[0].removeprefix("file:"), self._name)

    def __iter__(self) -> Iterator[tuple[Place, str]]:
        return ((place, BUFFER) for place in self._state.layout.places)

    def __len__(self) -> int:
        return len(self._state.layout.places)


def _arrangement(layout: Layout) -> tuple:
    """Where everything lies in a layout of one place."""
    pieces = sorted((name, piece.box, piece.offset, piece.strides) for name, piece in layout)
    return tuple(layout.sizes.values()), tuple(pieces)
