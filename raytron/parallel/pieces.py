"""Where a tensor lives: the data model of the layout algebra.

A `Layout` says, for every canonical tensor (Hugging Face's names and shapes), which places hold which box of it, and at
which offset and strides of their flat buffers. Fused QKV, fused gate/up, stacked experts, padding, interleaving and
transposes are all just strided boxes, so nothing that moves weights has to know a model family.

A *place* is an actor, its host memory or a file: never a rank, because ranks are renumbered when a job is resized and
places are not. The rejected alternative, a table of per-family conversion functions between parallel layouts, needs
one function per pair of layouts and says nothing about optimizer state.

Invariants (`Layout.check` holds 1 and 4; `plan` holds 2; 3 is the models' promise):

1. A place's pieces never overlap in storage; storage that is in no piece is padding, kept zero.
2. Sources may overlap (replicas, equal bits); each target element gets exactly one source.
3. No rank-local state: everything is sharded or truly replicated.
4. No empty boxes; strides are positive and nested (size-1 dimensions ignored).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from raytron.parallel.boxes import Box, colliding, extent, nested, terms, volume, whole

Place = str

ITEMSIZE: Mapping[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2, "int32": 4,
    "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8, "complex64": 8,
}  # fmt: skip


class Spot(NamedTuple):
    """Where a box starts in a place's flat buffer, and its stride per canonical dimension (both in elements)."""

    buffer: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a canonical tensor, held by every one of `places` at the same spot of a flat buffer.

    `offset` and `strides` (one per canonical dimension) are in elements inside the place's buffer of that name.
    """

    box: Box
    buffer: str
    offset: int
    strides: tuple[int, ...]
    places: tuple[Place, ...]

    def spot(self, box: Box | None = None) -> Spot:
        """The spot of `box` (canonical coordinates, inside this piece; default all of it)."""
        if box is None or box == self.box:
            return Spot(self.buffer, self.offset, self.strides)
        shift = sum((b[0] - mine[0]) * s for b, mine, s in zip(box, self.box, self.strides, strict=True))
        return Spot(self.buffer, self.offset + shift, self.strides)

    def part(self, box: Box, places: tuple[Place, ...] | None = None) -> Piece:
        """The piece that holds `box`, a part of this one's, at `places` (default the same)."""
        return Piece(box, self.buffer, self.spot(box).offset, self.strides, self.places if places is None else places)

    @property
    def extent(self) -> int:
        """Elements of storage from the first to one past the last."""
        return extent(self.box, self.strides)


@dataclass(frozen=True, slots=True)
class Spec:
    """A canonical tensor: its shape, the torch name of its dtype, and the block size a piece may not straddle on write.

    `grain` has one entry per dimension, 1 where any cut will do; empty means all ones.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    grain: tuple[int, ...] = ()

    def __post_init__(self):
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"unknown dtype {self.dtype!r}; use a torch dtype's name, one of {', '.join(ITEMSIZE)}")
        if self.grain and len(self.grain) != len(self.shape):
            raise ValueError(f"grain {self.grain} needs one entry for each dimension of shape {self.shape}")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def box(self) -> Box:
        """All of the tensor."""
        return whole(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where every canonical tensor lives.

    version: the committed step; all bytes belong to it.
    tensors: canonical name -> Spec.
    pieces: canonical name -> the pieces that are held somewhere (a name may be missing: nobody holds it).
    sizes: (place, buffer) -> length of that flat buffer in elements, padding included.
    """

    version: int
    tensors: Mapping[str, Spec]
    pieces: Mapping[str, tuple[Piece, ...]]
    sizes: Mapping[tuple[Place, str], int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Piece]]:
        """(name, piece) of every piece, in the order of `tensors`."""
        for name in self.tensors:
            for piece in self.pieces.get(name, ()):
                yield name, piece

    @property
    def places(self) -> tuple[Place, ...]:
        """Every place that holds a piece or a buffer, in order of first appearance."""
        seen = {place: None for place, _ in self.sizes}
        for places in {id(p.places): p.places for _, p in self}.values():
            seen.update(dict.fromkeys(places))
        return tuple(seen)

    def at(self, place: Place) -> Iterator[tuple[str, Piece]]:
        """(name, piece) of the pieces that `place` holds."""
        return ((name, piece) for name, piece in self if place in piece.places)

    def check(self) -> Layout:
        """Itself, after holding invariants 1 and 4; `ValueError` naming tensor, box and place otherwise."""
        for name in self.pieces:
            if name not in self.tensors:
                raise ValueError(f"{name}: has pieces but no Spec; add it to `tensors`")
        held: dict[tuple[Place, str], list[int]] = {}
        pieces = list(self)
        for i, (name, piece) in enumerate(pieces):
            self._check_piece(name, piece)
            for place in piece.places:
                held.setdefault((place, piece.buffer), []).append(i)
        seen: set[tuple[int, ...]] = set()
        for (place, buffer), indices in held.items():
            self._check_size(place, buffer, [pieces[i] for i in indices])
            key = tuple(indices)
            if key not in seen:  # replicas hold the same pieces at the same spots: once is enough
                seen.add(key)
                _check_storage(place, buffer, [pieces[i] for i in indices])
        return self

    def _check_piece(self, name: str, piece: Piece) -> None:
        shape = self.tensors[name].shape
        if len(piece.box) != len(shape) or len(piece.strides) != len(shape):
            raise ValueError(
                f"{name}: piece {piece.box} with strides {piece.strides} needs one range and one stride for each "
                f"dimension of the canonical shape {shape}"
            )
        if any(lo >= hi for lo, hi in piece.box):
            raise ValueError(f"{name}: piece {piece.box} is empty; leave out what a place does not hold")
        if any(lo < 0 or hi > n for (lo, hi), n in zip(piece.box, shape, strict=True)):
            raise ValueError(f"{name}: piece {piece.box} reaches outside the canonical shape {shape}")
        if not nested(piece.box, piece.strides):
            raise ValueError(
                f"{name}: strides {piece.strides} of piece {piece.box} are not positive and nested, so that elements "
                "would share storage; split the piece"
            )
        if not piece.places or len(set(piece.places)) != len(piece.places):
            raise ValueError(f"{name}: piece {piece.box} needs at least one place and each at most once")

    def _check_size(self, place: Place, buffer: str, held: list[tuple[str, Piece]]) -> None:
        size = self.sizes.get((place, buffer))
        if size is None:
            raise ValueError(f"{held[0][0]}: buffer {buffer!r} of {place!r} has no size; add it to `sizes`")
        for name, piece in held:
            if piece.offset < 0 or piece.offset + piece.extent > size:
                raise ValueError(
                    f"{name}: piece {piece.box} spans [{piece.offset}, {piece.offset + piece.extent}) of buffer "
                    f"{buffer!r} of {place!r}, which has {size} elements"
                )


def _check_storage(place: Place, buffer: str, held: list[tuple[str, Piece]]) -> None:
    clash = colliding([(piece.offset, terms(piece.box, piece.strides)) for _, piece in held])
    if clash is not None:
        (a, piece_a), (b, piece_b) = held[clash[0]], held[clash[1]]
        raise ValueError(
            f"{a} {piece_a.box} and {b} {piece_b.box} overlap in buffer {buffer!r} of {place!r} (offsets "
            f"{piece_a.offset} and {piece_b.offset}); give each element storage of its own"
        )


def elements(pieces: tuple[Piece, ...]) -> int:
    """Elements held, replicas counted."""
    return sum(volume(piece.box) * len(piece.places) for piece in pieces)
