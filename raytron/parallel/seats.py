"""`seats`: which place takes which seat of a target, so that resharding moves little.

A target layout may name abstract seats; any assignment of places to them is correct, and the naive one (number them in
order) moves everything. Overlap is counted between classes of places that hold exactly the same pieces, a handful per
parallel layout, and matched greedily. The rejected alternative, an optimal assignment (Hungarian, over ranks), is cubic
in ranks and gains nothing where survivors keep their shards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from raytron.parallel.boxes import intersect, overlapping, volume
from raytron.parallel.pieces import Layout, Place


@dataclass(frozen=True)
class _Classes:
    """Places that hold exactly the same pieces, as one: `members[c]` the places, `of[i]` the classes that hold group i,
    `group[id(places)]` the group of a piece's places tuple, `nbytes[c]` what each member holds."""

    members: list[list[Place]]
    of: list[list[int]]
    group: dict[int, int]
    nbytes: list[int]


def _classes(layout: Layout) -> _Classes:
    number: dict[tuple[Place, ...], int] = {}
    group: dict[int, int] = {}
    nbytes: dict[int, int] = defaultdict(int)
    for name, piece in layout:
        if id(piece.places) not in group:
            group[id(piece.places)] = number.setdefault(piece.places, len(number))
        nbytes[group[id(piece.places)]] += volume(piece.box) * layout.tensors[name].itemsize
    holds: dict[Place, list[int]] = {place: [] for place in layout.places}
    for places, g in number.items():
        for place in places:
            holds[place].append(g)
    signatures: dict[tuple[int, ...], list[Place]] = {}
    for place, groups in holds.items():
        signatures.setdefault(tuple(groups), []).append(place)
    of: list[list[int]] = [[] for _ in number]
    for c, groups in enumerate(signatures):
        for g in groups:
            of[g].append(c)
    return _Classes(list(signatures.values()), of, group, [sum(nbytes[g] for g in groups) for groups in signatures])


def seats(source: Layout, target: Layout, spare: Sequence[Place] = ()) -> dict[Place, Place]:
    """Which place takes each seat (each place named by `target`), so that survivors keep what they hold.

    Greedy by overlapping bytes over classes of places that hold the same; ties go to the tightest fit, to a place that
    already bears the seat's name, then to the order of appearance. Naive numbering would move everything. `spare`
    places hold nothing and take what is left. Apply the result with `relabel(target, seats(...))`.

    It seats one place at a time: to keep units or nodes together, drop whole units from `source` first.
    Raises `ValueError` when there are more seats than places.
    """
    held, wanted = _classes(source), _classes(target)
    free = [list(places) for places in held.members]
    empty = [list(places) for places in wanted.members]
    taken: dict[Place, Place] = {}
    overlap = _overlap(source, target, held, wanted)
    shared = {key: not set(wanted.members[key[0]]).isdisjoint(held.members[key[1]]) for key in overlap}
    for w, h in sorted(overlap, key=lambda key: (-overlap[key], held.nbytes[key[1]], not shared[key], key)):
        if empty[w] and free[h]:
            _seat(empty[w], free[h], taken)
    left_seats, left_places = [s for some in empty for s in some], [p for some in free for p in some]
    known = set(left_places) | set(taken.values())
    left_places += [place for place in spare if place not in known]
    if len(left_seats) > len(left_places):
        raise ValueError(
            f"the target has {len(left_seats) - len(left_places)} seats more than there are places "
            f"(first {left_seats[0]!r}); pass more places as `spare` or ask for a smaller target"
        )
    _seat(left_seats, left_places, taken)
    return {seat: taken[seat] for seat in target.places}


def _overlap(source: Layout, target: Layout, held: _Classes, wanted: _Classes) -> dict[tuple[int, int], int]:
    """Bytes that a member of each held class already has of what a seat of each wanted class needs."""
    total: dict[tuple[int, int], int] = defaultdict(int)
    for name, spec in target.tensors.items():
        want, have = target.pieces.get(name, ()), source.pieces.get(name, ())
        hits = overlapping([piece.box for piece in want], [piece.box for piece in have])
        for piece, hit in zip(want, hits, strict=True):
            seats_of = wanted.of[wanted.group[id(piece.places)]]
            for j in hit:
                common = intersect(piece.box, have[j].box)
                n = volume(common) * spec.itemsize
                for h in held.of[held.group[id(have[j].places)]]:
                    for w in seats_of:
                        total[w, h] += n
    return total


def _seat(empty: list[Place], free: list[Place], taken: dict[Place, Place]) -> None:
    """Fill `empty` seats from `free` places, namesakes first, then in order; both lists keep what is left."""
    places = set(free)
    same = [seat for seat in empty if seat in places]
    taken.update(zip(same, same, strict=True))
    if same:
        gone = set(same)
        empty[:] = [seat for seat in empty if seat not in gone]
        free[:] = [place for place in free if place not in gone]
    n = min(len(empty), len(free))
    taken.update(zip(empty[:n], free[:n], strict=True))
    del empty[:n], free[:n]
