"""`plan`: which bytes go from where to where, as a pure function of two layouts of one version.

Every target element gets exactly one source: what the place itself holds first, then a holder on its node, then the
least loaded replica; so bytes are the floor, what each target place needs less what it holds.

Time stays linear in the number of distinct pieces, not of ranks, because sources are grouped by box and pieces by their
holders: one `Move` carries all replicas that do the same thing. The rejected alternative, planning rank by rank, is
simpler and 20-100 times slower at a thousand ranks.
"""

from __future__ import annotations

import difflib
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from raytron.parallel.boxes import Box, coarsen, intersect, overlapping, subtract_all, volume
from raytron.parallel.pieces import Layout, Piece, Place, Spec, Spot


class CoverageError(ValueError):
    """A target asks for elements that no source holds: `.name` is the tensor, `.boxes` what is missing."""

    def __init__(self, message: str, name: str, boxes: Sequence[Box]):
        super().__init__(message)
        self.name, self.boxes = name, tuple(boxes)


@dataclass(frozen=True, slots=True)
class Move:
    """Copy `box` of tensor `name` from `at` of `src[i]` to `to` of `dst[i]`, for every i (local where they are equal).

    `at` and `to` are the spots of `box` itself: its first element's offset and its strides.
    """

    name: str
    box: Box
    src: tuple[Place, ...]
    at: Spot
    dst: tuple[Place, ...]
    to: Spot

    def pairs(self) -> Iterator[tuple[Place, Place]]:
        """(source, target) places, in lockstep."""
        return zip(self.src, self.dst, strict=True)


@dataclass(frozen=True)
class Plan:
    """Moves in the target's tensor order; `source` and `target` give each tensor's Spec (dtypes may differ: a cast).

    An element whose source and target spot coincide has a move too (local, nothing to do), so the moves into a target
    place cover its pieces exactly.
    """

    moves: tuple[Move, ...]
    source: Mapping[str, Spec]
    target: Mapping[str, Spec]

    def wire(self, name: str) -> str:
        """The dtype tensor `name` travels in: the narrower end's, since an elementwise cast commutes with a copy."""
        source, target = self.source[name], self.target[name]
        return target.dtype if target.itemsize < source.itemsize else source.dtype

    def nbytes(self, move: Move) -> int:
        """Bytes of one copy of the move's box as it travels."""
        return volume(move.box) * min(self.source[move.name].itemsize, self.target[move.name].itemsize)

    @cached_property
    def bytes_moved(self) -> int:
        """Bytes that cross from one place to another."""
        return sum(self.nbytes(m) * sum(map(str.__ne__, m.src, m.dst)) for m in self.moves)

    @cached_property
    def bytes_local(self) -> int:
        """Bytes that stay on their place, those already at their target spot included."""
        return sum(self.nbytes(m) * sum(map(str.__eq__, m.src, m.dst)) for m in self.moves)

    def retyped(self, source: str | None = None, target: str | None = None) -> Plan:
        """The same moves for buffers of other dtypes: masters and both moments share one plan."""

        def of(specs: Mapping[str, Spec], dtype: str | None) -> Mapping[str, Spec]:
            return specs if dtype is None else {name: replace(spec, dtype=dtype) for name, spec in specs.items()}

        return Plan(self.moves, of(self.source, source), of(self.target, target))

    def filter(self, keep: Callable[[Place, Place], bool]) -> Plan:
        """The part of the plan between chosen (source, target) places, e.g. what comes from files."""
        moves = []
        for move in self.moves:
            kept = [pair for pair in move.pairs() if keep(*pair)]
            if len(kept) == len(move.src):
                moves.append(move)
            elif kept:
                src, dst = zip(*kept, strict=True)
                moves.append(replace(move, src=src, dst=dst))
        return replace(self, moves=tuple(moves))

    def buckets(self, max_bytes: int) -> Iterator[Plan]:
        """Parts of the plan in order, each of whole tensors, in which no place sends, receives and copies more than
        `max_bytes` (a tensor that alone exceeds it is a bucket of its own). Every rank derives the same buckets.
        """
        load: dict[Place, int] = defaultdict(int)
        bucket: list[Move] = []
        for moves in self._by_tensor():
            mine: dict[Place, int] = defaultdict(int)
            for move in moves:
                n = self.nbytes(move)
                for src, dst in move.pairs():
                    mine[dst] += n
                    if src != dst:
                        mine[src] += n
            if bucket and any(load[place] + n > max_bytes for place, n in mine.items()):
                yield replace(self, moves=tuple(bucket))
                bucket, load = [], defaultdict(int)
            bucket += moves
            for place, n in mine.items():
                load[place] += n
        if bucket:
            yield replace(self, moves=tuple(bucket))

    def _by_tensor(self) -> Iterator[list[Move]]:
        run: list[Move] = []
        for move in self.moves:
            if run and move.name != run[-1].name:
                yield run
                run = []
            run.append(move)
        if run:
            yield run


def plan(source: Layout, target: Layout, node: Callable[[Place], str] | None = None) -> Plan:
    """The moves that make `target` from `source`: each target element once, bytes the floor for the target's places.

    node: place -> its node; a holder on the same node is preferred to a remote one (None: every place its own node).

    Pure and deterministic. Raises `CoverageError` when the source does not hold all the target asks for, and
    `ValueError` on layouts of different versions or shapes, or a target piece that splits a block of its `grain`.
    """
    if source.version != target.version:
        raise ValueError(
            f"the source is of version {source.version} and the target of version {target.version}; bytes of different "
            "steps never mix: give the target the source's version"
        )
    planner = _Planner(node)
    moves: list[Move] = []
    names = [name for name in target.tensors if target.pieces.get(name)]
    for name in names:
        spec, wanted = target.tensors[name], target.pieces[name]
        _check_tensor(name, source, spec, wanted)
        itemsize = min(spec.itemsize, source.tensors[name].itemsize)
        moves += planner.tensor(name, spec, itemsize, wanted, source.pieces.get(name, ()))
    return Plan(tuple(moves), {n: source.tensors[n] for n in names}, {n: target.tensors[n] for n in names})


def _check_tensor(name: str, source: Layout, spec: Spec, wanted: Sequence[Piece]) -> None:
    theirs = source.tensors.get(name)
    if theirs is None:
        near = difflib.get_close_matches(name, source.tensors, 1)
        hint = f" (it has {near[0]})" if near else ""
        raise CoverageError(
            f"{name}: the source has no tensor of that name{hint}; check that both are of one model, with Hugging "
            "Face's names",
            name,
            [piece.box for piece in wanted],
        )
    if theirs.shape != spec.shape:
        raise ValueError(
            f"{name}: canonical shape {theirs.shape} in the source and {spec.shape} in the target; check that both are "
            "of one model (the vocabulary's padding is not part of the canonical shape)"
        )
    if any(g != 1 for g in spec.grain):
        for piece in wanted:
            try:
                coarsen(piece.box, spec.grain, exact=True, shape=spec.shape)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


class _Planner:
    """The bytes each place has been asked to send so far, and caches; one per `plan`."""

    def __init__(self, node: Callable[[Place], str] | None):
        self._node = node
        self._nodes: dict[Place, str] = {}
        self._sets: dict[int, frozenset[Place]] = {}  # by identity: replicas share one tuple
        self._load: dict[Place, int] = defaultdict(int)

    def tensor(
        self, name: str, spec: Spec, itemsize: int, wanted: Sequence[Piece], held: Sequence[Piece]
    ) -> list[Move]:
        groups: dict[Box, list[Piece]] = {}
        for piece in held:
            groups.setdefault(piece.box, []).append(piece)
        moves: list[Move] = []
        rest: list[tuple[Piece, tuple[Place, ...]]] = []
        for piece in wanted:
            needy = self._kept(name, piece, groups.get(piece.box, ()), moves)
            if needy:
                rest.append((piece, needy))
        boxes = list(groups)
        hits = overlapping([piece.box for piece, _ in rest], boxes)
        missing: list[Box] = []
        for (piece, needy), hit in zip(rest, hits, strict=True):
            near = [groups[boxes[k]] for k in hit]
            missing += self._mixed(name, itemsize, piece, needy, near, moves)
        if missing:
            _refuse(name, spec, missing, wanted)
        return moves

    def _set(self, places: tuple[Place, ...]) -> frozenset[Place]:
        found = self._sets.get(id(places))
        if found is None:
            found = self._sets[id(places)] = frozenset(places)
        return found

    def _kept(
        self, name: str, want: Piece, same: Sequence[Piece], moves: list[Move]
    ) -> tuple[Place, ...]:  # the places that do not hold exactly this box
        needy, to = want.places, want.spot()
        for piece in sorted(same, key=lambda p: p.spot() != to):  # what is already in its place first
            if piece.places is needy or piece.places == needy:
                here, needy = needy, ()
            else:
                places = self._set(piece.places)
                here = tuple(p for p in needy if p in places)
                needy = tuple(p for p in needy if p not in places) if here else needy
            if here:
                moves.append(Move(name, want.box, here, piece.spot(), here, to))
            if not needy:
                break
        return needy

    def _mixed(
        self,
        name: str,
        itemsize: int,
        want: Piece,
        needy: tuple[Place, ...],
        groups: Sequence[Sequence[Piece]],
        moves: list[Move],
    ) -> list[Box]:  # what is missing
        """Parts from several sources: places that hold the same parts already are served together."""
        own: dict[Place, list[Piece]] = {place: [] for place in needy}
        needy_set = frozenset(needy)
        for piece in (piece for group in groups for piece in group):
            for place in needy_set & self._set(piece.places):
                own[place].append(piece)
        alike: dict[tuple[int, ...], list[Place]] = {}
        for place, pieces in own.items():
            alike.setdefault(tuple(map(id, pieces)), []).append(place)
        missing: list[Box] = []
        for places in alike.values():
            rest, here = [want.box], tuple(places)
            for piece in own[places[0]]:
                for part in _common(rest, piece.box):
                    moves.append(Move(name, part, here, piece.spot(part), here, want.part(part).spot()))
                rest = subtract_all(rest, [piece.box])
            for box in rest:
                missing += self._fetch(name, itemsize, want, here, box, groups, moves)
        return missing

    def _fetch(
        self,
        name: str,
        itemsize: int,
        want: Piece,
        places: tuple[Place, ...],
        box: Box,
        groups: Sequence[Sequence[Piece]],
        moves: list[Move],
    ) -> list[Box]:
        parts = [(common, group) for group in groups if (common := intersect(box, group[0].box)) is not None]
        spare = sum(volume(common) for common, _ in parts) > volume(box)
        if not spare and len(parts) == 1 and parts[0][0] == box:
            self._assign(name, itemsize, want, places, box, parts[0][1], moves)
            return []
        missing: list[Box] = []
        for alike in self._by_neighbours(places, parts) if spare else [places]:
            rest = [box]
            for _, group in sorted(parts, key=lambda part: self._rank(alike, part[1])) if spare else parts:
                for part in _common(rest, group[0].box):
                    self._assign(name, itemsize, want, alike, part, group, moves)
                rest = subtract_all(rest, [group[0].box])
            missing += rest
        return missing

    def _by_neighbours(
        self, places: tuple[Place, ...], parts: Sequence[tuple[Box, Sequence[Piece]]]
    ) -> list[tuple[Place, ...]]:
        """Places whose nodes hold the same of several overlapping sources choose alike."""
        if self._node is None:
            return [places]
        nodes = [{self._node_of(place) for piece in group for place in piece.places} for _, group in parts]
        alike: dict[tuple[bool, ...], list[Place]] = {}
        for place in places:
            alike.setdefault(tuple(self._node_of(place) in held for held in nodes), []).append(place)
        return [tuple(some) for some in alike.values()]

    def _rank(self, places: tuple[Place, ...], group: Sequence[Piece]) -> tuple[bool, int]:
        holders = [place for piece in group for place in piece.places]
        far = self._node is None or self._node_of(places[0]) not in {self._node_of(place) for place in holders}
        return far, min(self._load[place] for place in holders)

    def _node_of(self, place: Place) -> str:
        found = self._nodes.get(place)
        if found is None:
            found = self._nodes[place] = self._node(place)
        return found

    def _assign(
        self,
        name: str,
        itemsize: int,
        want: Piece,
        places: tuple[Place, ...],
        part: Box,
        group: Sequence[Piece],
        moves: list[Move],
    ) -> None:
        """Choose a holder of `part` for each place: on its node if any, the least loaded of those, then the first."""
        nbytes, load = volume(part) * itemsize, self._load
        heap = [(load[place], k, i, place) for i, piece in enumerate(group) for k, place in enumerate(piece.places)]
        neighbours: dict[str, list[tuple[int, Place]]] = defaultdict(list)
        if self._node is not None:
            for _, _, i, place in heap:
                neighbours[self._node_of(place)].append((i, place))
        heapq.heapify(heap)
        chosen: dict[int, tuple[list[Place], list[Place]]] = {}
        for dst in places:
            near = neighbours.get(self._node_of(dst)) if neighbours else None
            if near:
                i, src = min(near, key=lambda holder: load[holder[1]])
            else:
                while heap[0][0] != load[heap[0][3]]:  # a neighbour's request came in between
                    _, k, i, src = heap[0]
                    heapq.heapreplace(heap, (load[src], k, i, src))
                seen, k, i, src = heap[0]
                heapq.heapreplace(heap, (seen + nbytes, k, i, src))
            load[src] += nbytes
            sources, targets = chosen.setdefault(i, ([], []))
            sources.append(src)
            targets.append(dst)
        to = want.part(part).spot()
        for i, (sources, targets) in chosen.items():
            moves.append(Move(name, part, tuple(sources), group[i].spot(part), tuple(targets), to))


def _common(boxes: Sequence[Box], with_: Box) -> list[Box]:
    return [part for box in boxes if (part := intersect(box, with_)) is not None]


def _refuse(name: str, spec: Spec, missing: Sequence[Box], wanted: Sequence[Piece]) -> None:
    distinct: list[Box] = []
    for box in missing:
        distinct += subtract_all([box], distinct)
    first = distinct[0]
    place = next(piece.places[0] for piece in wanted if intersect(piece.box, first) is not None)
    raise CoverageError(
        f"{name}: no source holds {first} (in all {sum(map(volume, distinct))} of {spec.numel} elements are missing), "
        f"which {place!r} needs; add a source that holds it with union(), such as a twin's copy or a checkpoint's "
        "files, or go back to the newest version whose union covers the target",
        name,
        distinct,
    )
