"""The layout algebra: pure functions from layouts to layouts (and the public face of `pieces`, `planning` and `seats`).

Loading and saving checkpoints, converting between parallel layouts, growing and shrinking a running job, recovering
from a lost actor and pushing weights into a rollout engine are one operation: `plan(source, target)`, two layouts of
one version, then `transport.run`. What a loss leaves is `without`, what a half-finished reshape holds is `union`, ZeRO
shards are `cut`; each is again a layout, so every one can be planned from. The rejected alternative, a recovery path
beside the resharding path beside the checkpoint converter, is three programs that must agree.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from raytron.parallel.boxes import (
    Box,
    coarsen,
    count_below,
    disjoint,
    flat_boxes,
    intersect,
    overlapping,
    subtract,
    subtract_all,
    volume,
)
from raytron.parallel.pieces import ITEMSIZE, Layout, Piece, Place, Spec, Spot
from raytron.parallel.planning import CoverageError, Move, Plan, plan
from raytron.parallel.seats import seats

__all__ = [
    "ITEMSIZE",
    "Box",
    "CoverageError",
    "Layout",
    "Move",
    "Piece",
    "Place",
    "Plan",
    "Spec",
    "Spot",
    "coarsen",
    "cut",
    "fragile",
    "intersect",
    "only",
    "owners",
    "plan",
    "relabel",
    "rename",
    "retype",
    "seats",
    "subtract",
    "union",
    "volume",
    "without",
]

Interval = tuple[int, int]


def without(layout: Layout, places: Collection[Place]) -> Layout:
    """What is left when `places` are gone. Tensors stay declared, so that a later plan names what is lost."""
    gone = set(places)
    return _keep(layout, lambda place: place not in gone, layout.tensors)


def only(layout: Layout, names: Collection[str] | None = None, places: Collection[Place] | None = None) -> Layout:
    """The layout of some tensors (in the layout's order) at some places; None means all. One rank plans its own part,
    and a half-finished reshape has the target's finished tensors."""
    chosen = None if names is None else set(names)
    kept = None if places is None else set(places)
    tensors = {name: spec for name, spec in layout.tensors.items() if chosen is None or name in chosen}
    return _keep(layout, lambda place: kept is None or place in kept, tensors)


def _keep(layout: Layout, stays: Callable[[Place], bool], tensors: Mapping[str, Spec]) -> Layout:
    narrowed: dict[int, tuple[Place, ...]] = {}  # replicas share one tuple, before and after

    def narrow(places: tuple[Place, ...]) -> tuple[Place, ...]:
        if id(places) not in narrowed:
            left = tuple(place for place in places if stays(place))
            narrowed[id(places)] = places if len(left) == len(places) else left
        return narrowed[id(places)]

    pieces: dict[str, tuple[Piece, ...]] = {}
    for name in tensors:
        held = tuple(
            piece if left is piece.places else _at(piece, left)
            for piece in layout.pieces.get(name, ())
            if (left := narrow(piece.places))
        )
        if held:
            pieces[name] = held
    return Layout(layout.version, tensors, pieces, {key: n for key, n in layout.sizes.items() if stays(key[0])})


def _at(piece: Piece, places: tuple[Place, ...]) -> Piece:
    return Piece(piece.box, piece.buffer, piece.offset, piece.strides, places)


def relabel(
    layout: Layout, places: Mapping[Place, Place] | None = None, buffers: Mapping[str, str] | None = None
) -> Layout:
    """The layout with places (as `seats` gives them) and buffers renamed; names that are not mapped stay."""
    to_place, to_buffer = places or {}, buffers or {}
    renamed: dict[int, tuple[Place, ...]] = {}

    def rename(old: tuple[Place, ...]) -> tuple[Place, ...]:
        if id(old) not in renamed:
            renamed[id(old)] = tuple(to_place.get(place, place) for place in old)
        return renamed[id(old)]

    def move(piece: Piece) -> Piece:
        buffer = to_buffer.get(piece.buffer, piece.buffer)
        return Piece(piece.box, buffer, piece.offset, piece.strides, rename(piece.places))

    sizes = {(to_place.get(place, place), to_buffer.get(b, b)): n for (place, b), n in layout.sizes.items()}
    if len(sizes) != len(layout.sizes):
        raise ValueError("two buffers would bear the same (place, buffer) name; map places and buffers one to one")
    pieces = {name: tuple(move(piece) for piece in held) for name, held in layout.pieces.items()}
    return Layout(layout.version, layout.tensors, pieces, sizes)


def rename(layout: Layout, name: Callable[[str], str]) -> Layout:
    """The layout with its tensors renamed, each to a name of its own; buffers keep theirs."""
    tensors = {name(old): spec for old, spec in layout.tensors.items()}
    assert len(tensors) == len(layout.tensors), "two tensors would bear one name"
    return replace(layout, tensors=tensors, pieces={name(old): held for old, held in layout.pieces.items()})


def retype(layout: Layout, dtype: str) -> Layout:
    """The same layout with every tensor of another dtype, e.g. fp32 masters of bf16 weights."""
    return replace(layout, tensors={name: replace(spec, dtype=dtype) for name, spec in layout.tensors.items()})


def union(*layouts: Layout) -> Layout:
    """Everything that any of the layouts (all of one version) holds; a half-finished reshape is old union new.

    Where a place's old and new buffers differ, they need different names (`relabel`).
    Raises `ValueError` on different versions, on a tensor of two shapes or dtypes, on a buffer of two sizes.
    """
    versions = sorted({layout.version for layout in layouts})
    if len(versions) != 1:
        raise ValueError(
            f"union of layouts of versions {versions}; bytes of different steps never mix: leave out the older ones"
        )
    tensors: dict[str, Spec] = {}
    sizes: dict[tuple[Place, str], int] = {}
    holders: dict[str, dict[tuple[Box, Spot], dict[Place, None]]] = defaultdict(dict)
    for layout in layouts:
        for name, spec in layout.tensors.items():
            if tensors.setdefault(name, spec) != spec:
                raise ValueError(f"{name}: is {tensors[name]} in one layout and {spec} in another; convert one of them")
        for (place, buffer), n in layout.sizes.items():
            if sizes.setdefault((place, buffer), n) != n:
                raise ValueError(
                    f"buffer {buffer!r} of {place!r} has {sizes[place, buffer]} elements in one layout and {n} in "
                    "another; give the new buffer a name of its own with relabel(layout, buffers=...)"
                )
        for name, piece in layout:
            holders[name].setdefault((piece.box, piece.spot()), {}).update(dict.fromkeys(piece.places))
    shared: dict[tuple[Place, ...], tuple[Place, ...]] = {}
    pieces = {
        name: tuple(
            Piece(box, *spot, shared.setdefault(places := tuple(held), places)) for (box, spot), held in found.items()
        )
        for name, found in holders.items()
    }
    return Layout(versions[0], tensors, pieces, sizes)


# ZeRO


def cut(
    layout: Layout, intervals: Mapping[Place, Sequence[Interval]], *, of: str = "weights", buffer: str = "shard"
) -> Layout:
    """The layout of flat half-open `intervals` of each place's buffer `of`, concatenated in order in a new `buffer`.

    ZeRO-1: each data-parallel rank keeps masters and moments of one interval of the weights, so reduce-scatter is
    contiguous and models declare nothing. An interval of a strided piece is at most 2 * ndim - 1 boxes; strides stay,
    offsets become positions in the concatenation. Places without intervals hold nothing in the result.

    Raises `ValueError` where a place's intervals overlap or leave its buffer.
    """
    cuts = {place: _Cuts(layout, place, of, some) for place, some in intervals.items()}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name, held in layout.pieces.items():
        found: dict[tuple[Box, int, tuple[int, ...]], list[Place]] = {}
        for piece in held:
            if piece.buffer != of:
                continue
            order = sorted(range(len(piece.box)), key=lambda d: -piece.strides[d])
            end = piece.offset + piece.extent
            for place in piece.places:
                if place not in cuts:
                    continue
                for start, stop, base in cuts[place].across(piece.offset, end):
                    for box in _interval_boxes(piece, order, start - piece.offset, stop - piece.offset, end):
                        at = piece.spot(box).offset - start + base
                        found.setdefault((box, at, piece.strides), []).append(place)
        if found:
            pieces[name] = tuple(Piece(box, buffer, at, strides, tuple(p)) for (box, at, strides), p in found.items())
    return Layout(layout.version, layout.tensors, pieces, {(place, buffer): c.size for place, c in cuts.items()})


class _Cuts:
    """One place's intervals, sorted, with the position of each in their concatenation."""

    def __init__(self, layout: Layout, place: Place, buffer: str, intervals: Sequence[Interval]):
        have = layout.sizes.get((place, buffer))
        if have is None:
            raise ValueError(f"{place!r} has no buffer {buffer!r} to cut; its name is the argument `of`")
        based, self.size = [], 0
        for start, stop in intervals:
            if not 0 <= start <= stop <= have:
                raise ValueError(f"interval [{start}, {stop}) leaves buffer {buffer!r} of {place!r} ({have} elements)")
            if start < stop:
                based.append((start, stop, self.size))
            self.size += stop - start
        self._sorted = sorted(based)
        self._starts = [start for start, _, _ in self._sorted]
        for (_, stop, _), (start, _, _) in pairwise(self._sorted):
            if start < stop:
                raise ValueError(f"intervals of {place!r} overlap at {start}; a ZeRO shard holds each element once")

    def across(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The intervals that meet [start, stop)."""
        for k in range(max(0, bisect_right(self._starts, start) - 1), len(self._sorted)):
            interval = self._sorted[k]
            if interval[0] >= stop:
                return
            if interval[1] > start:
                yield interval


def _interval_boxes(piece: Piece, order: Sequence[int], start: int, stop: int, end: int) -> list[Box]:
    """Canonical boxes of the piece's elements at addresses [start, stop) relative to its first element.

    Nested strides make the order of addresses the lexicographic order of the indices, widest stride first (`order`).
    """
    if start <= 0 and stop >= end - piece.offset:
        return [piece.box]
    sizes = [piece.box[d][1] - piece.box[d][0] for d in order]
    ordered = tuple((piece.strides[d], n) for d, n in zip(order, sizes, strict=True))
    # A stride of a dimension of size 1 means nothing (and need not be nested): no address ever moves along it.
    counted = tuple((stride, n) for stride, n in ordered if n > 1)
    first, last = count_below(max(start, 0), counted), count_below(max(stop, 0), counted)
    out = []
    for flat in flat_boxes(sizes, first, last):
        box = list(piece.box)
        for d, (lo, hi) in zip(order, flat, strict=True):
            box[d] = (piece.box[d][0] + lo, piece.box[d][0] + hi)
        out.append(tuple(box))
    return out


# Owners and fragility


def owners(layout: Layout) -> Layout:
    """Every element that is held, exactly once, by one place; spread evenly. For norms, checksums and saving."""
    load: dict[Place, int] = defaultdict(int)
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name, spec in layout.tensors.items():
        groups: dict[Box, list[Piece]] = {}
        for piece in layout.pieces.get(name, ()):
            groups.setdefault(piece.box, []).append(piece)
        boxes = list(groups)
        apart = disjoint(boxes)
        chosen: list[Piece] = []
        taken: list[Box] = []
        for box in boxes if apart else sorted(boxes, key=lambda box: (-volume(box), box)):
            parts = [box] if apart else subtract_all([box], [t for t in taken if intersect(t, box) is not None])
            for part in parts:
                piece, place = min(
                    ((piece, place) for piece in groups[box] for place in piece.places),
                    key=lambda holder: load[holder[1]],
                )
                load[place] += volume(part) * spec.itemsize
                chosen.append(piece.part(part, (place,)))
            taken.append(box)
        if chosen:
            pieces[name] = tuple(chosen)
    return Layout(layout.version, layout.tensors, pieces, layout.sizes)


def fragile(layout: Layout, node: Callable[[Place], str] | None = None) -> dict[str, dict[str, tuple[Box, ...]]]:
    """What the loss of one node would lose: node -> tensor -> disjoint boxes that no other node holds.

    node: place -> its node (None: every place its own). Empty when every element is on two nodes or more.
    """
    nodes_of: dict[int, frozenset[str]] = {}
    lost: dict[str, dict[str, tuple[Box, ...]]] = {}
    for name in layout.tensors:
        held: dict[Box, set[str]] = {}
        for piece in layout.pieces.get(name, ()):
            nodes = nodes_of.get(id(piece.places))
            if nodes is None:
                nodes = frozenset(piece.places if node is None else map(node, piece.places))
                nodes_of[id(piece.places)] = nodes
            held.setdefault(piece.box, set()).update(nodes)
        boxes = list(held)
        alone = [box for box in boxes if len(held[box]) == 1]
        for box, hits in zip(alone, overlapping(alone, boxes), strict=True):
            (only_node,) = held[box]
            others = [boxes[j] for j in hits if held[boxes[j]] != {only_node}]
            found = lost.get(only_node, {}).get(name, ())
            rest = subtract_all([box], [*others, *found])
            if rest:
                lost.setdefault(only_node, {})[name] = (*found, *rest)
    return lost
