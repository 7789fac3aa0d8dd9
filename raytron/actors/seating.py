"""Who takes which rank of a mesh that has changed. Pure: names of places in, names of places by rank out.

Whoever stays keeps its position in its unit, and so what it holds; the holes are filled by those whose unit is given up
and by newcomers, one tensor-parallel group after the other, from one node each while any has enough. Where the unit
itself changes nobody keeps a position, and only the order of the old ranks is kept, which goes by nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from raytron.parallel.mesh import Mesh

__all__ = ["seating"]


def seating(
    old: Mesh,
    places: Sequence[str],
    new: Mesh,
    nodes: Mapping[str, str],
    *,
    out: Collection[str] = (),
    units: Collection[int] = (),
    fresh: Sequence[str] = (),
) -> tuple[str, ...]:
    """Places by rank of `new`.

    Args:
        old, places: the mesh as it was, and who sat where, by rank.
        nodes: on which node each place is.
        out: those who have no seat any more.
        units: positions on the old dp axis that are given up; their places may fill holes elsewhere.
        fresh: newcomers, in the order in which they are taken.

    Raises:
        ValueError: there are fewer places than seats.
    """
    staying = [place for place in places if place not in out]
    if (old.pp, old.cp, old.tp) != (new.pp, new.cp, new.tp):
        return _filled([None] * new.size, [*staying, *fresh], new, nodes, {})
    kept = [rank for rank in range(old.size) if rank // old.unit not in units][: new.size]
    seats = [places[rank] if places[rank] not in out else None for rank in kept]
    seats += [None] * (new.size - len(seats))
    seated = {place for place in seats if place}
    position = {place: rank % old.unit for rank, place in enumerate(places)}
    return _filled(seats, [p for p in (*staying, *fresh) if p not in seated], new, nodes, position)


def _filled(
    seats: list[str | None], free: list[str], mesh: Mesh, nodes: Mapping[str, str], position: Mapping[str, int]
) -> tuple[str, ...]:
    """`seats` with its holes filled from `free`; groups that have somebody already choose first."""
    if (missing := seats.count(None) - len(free)) > 0:
        raise ValueError(f"{mesh.size} seats, {missing} more than there are places; start more or ask for fewer")
    groups = [range(start, start + mesh.tp) for start in range(0, mesh.size, mesh.tp)]
    for group in sorted(groups, key=lambda group: all(seats[rank] is None for rank in group)):
        for rank in (holes := [rank for rank in group if seats[rank] is None]):
            node = _node([seats[r] for r in group if seats[r]], free, len(holes), nodes)
            here = [place for place in free if nodes[place] == node] or free
            place = next((p for p in here if position.get(p) == rank % mesh.unit), here[0])
            seats[rank] = place
            free.remove(place)
    return tuple(place for place in seats if place is not None)


def _node(peers: Sequence[str], free: Sequence[str], wanted: int, nodes: Mapping[str, str]) -> str:
    """Where to look for so many places: the peers' node if it has one, else the first that has enough, else the
    fullest."""
    there = Counter(nodes[place] for place in free)
    at = Counter(nodes[peer] for peer in peers).most_common(1)
    if at and there[at[0][0]]:
        return at[0][0]
    enough = (node for node, count in there.items() if count >= wanted)
    return next(enough, there.most_common(1)[0][0])
