"""Boxes and strided storage: the integer geometry under the layout algebra.

A `Box` is a half-open index range per dimension of a canonical tensor; `()` is the box of a scalar (so test `is None`,
never falsiness). Storage is a flat array of elements; a strided box puts element `i` of a box at
`offset + sum(i_d * stride_d)`. Nested strides (each larger than the whole extent of the smaller ones) make that map
injective and make the order of addresses a lexicographic order, which is all that cutting flat intervals needs.

Everything here is exact integer arithmetic on tuples; numpy serves only to compare many boxes with many. A dense
bitmap per buffer would be simpler and right, and cannot hold a 405B model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

Box = tuple[tuple[int, int], ...]
Terms = tuple[tuple[int, int], ...]  # (stride, size) of each dimension, widest stride first

_PYTHON_PAIRS = 64  # below this many pairs a Python loop beats numpy's fixed cost
_MAX_PAIRS = 1 << 22  # pairs compared at once: bounds the comparison to tens of MB


def whole(shape: Sequence[int]) -> Box:
    """The box of all of a tensor."""
    return tuple((0, n) for n in shape)


def volume(box: Box) -> int:
    """Number of elements; 1 for the scalar box."""
    n = 1
    for lo, hi in box:
        n *= hi - lo
    return n


def intersect(a: Box, b: Box) -> Box | None:
    """The common part, None when there is none. Boxes have the same number of dimensions."""
    out = []
    for (a_lo, a_hi), (b_lo, b_hi) in zip(a, b, strict=True):
        lo = a_lo if a_lo > b_lo else b_lo
        hi = a_hi if a_hi < b_hi else b_hi
        if lo >= hi:
            return None
        out.append((lo, hi))
    return tuple(out)


def subtract(a: Box, b: Box) -> list[Box]:
    """`a` without `b` as disjoint boxes, at most two per dimension."""
    both = intersect(a, b)
    if both is None:
        return [a]
    rest = []
    for d, ((a_lo, a_hi), (lo, hi)) in enumerate(zip(a, both, strict=True)):
        head, tail = both[:d], a[d + 1 :]
        if a_lo < lo:
            rest.append((*head, (a_lo, lo), *tail))
        if hi < a_hi:
            rest.append((*head, (hi, a_hi), *tail))
    return rest


def subtract_all(boxes: Iterable[Box], holes: Iterable[Box]) -> list[Box]:
    """What of `boxes` is in none of `holes`, as boxes (disjoint if `boxes` are)."""
    rest = list(boxes)
    for hole in holes:
        if not rest:
            break
        rest = [part for box in rest for part in subtract(box, hole)]
    return rest


def flat_boxes(sizes: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of the C-order enumeration of `sizes`, as at most 2 * ndim - 1 boxes (1 for a scalar)."""
    if start >= stop:
        return []
    if not sizes:
        return [()]
    inner_sizes = sizes[1:]
    inner = math.prod(inner_sizes)
    (first, a), (last, b) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        return [((first, first + 1), *box) for box in flat_boxes(inner_sizes, a, b)]
    out: list[Box] = []
    if a:
        out += [((first, first + 1), *box) for box in flat_boxes(inner_sizes, a, inner)]
        first += 1
    if first < last:
        out.append(((first, last), *whole(inner_sizes)))
    if b:
        out += [((last, last + 1), *box) for box in flat_boxes(inner_sizes, 0, b)]
    return out


def overlapping(wanted: Sequence[Box], held: Sequence[Box]) -> list[list[int]]:
    """For each wanted box, the indices of the held boxes that share an element with it, in order."""
    if not wanted or not held or not wanted[0]:  # scalars: every box is ()
        return [list(range(len(held))) for _ in wanted]
    if len(wanted) * len(held) <= _PYTHON_PAIRS:
        return [[j for j, h in enumerate(held) if intersect(w, h) is not None] for w in wanted]
    w, h = np.asarray(wanted, dtype=np.int64), np.asarray(held, dtype=np.int64)  # [m, d, 2], [n, d, 2]
    step = max(1, _MAX_PAIRS // len(held))
    out: list[list[int]] = []
    for at in range(0, len(wanted), step):
        part = w[at : at + step, None]
        hit = np.ones((part.shape[0], len(held)), dtype=bool)
        for d in range(w.shape[1]):  # one dimension at a time: no [m, n, d] temporary
            hit &= (part[:, :, d, 0] < h[None, :, d, 1]) & (h[None, :, d, 0] < part[:, :, d, 1])
        rows, columns = np.nonzero(hit)
        bounds = np.searchsorted(rows, np.arange(hit.shape[0] + 1)).tolist()
        columns = columns.tolist()
        out += [columns[a:b] for a, b in pairwise(bounds)]
    return out


def disjoint(boxes: Sequence[Box]) -> bool:
    """Whether no two boxes share an element."""
    return all(len(hits) == 1 for hits in overlapping(boxes, boxes))


def coarsen(box: Box, grain: Sequence[int], exact: bool, shape: Sequence[int] | None = None) -> Box:
    """The blocks (of `grain` elements per dimension) that `box` touches, as a box in block coordinates.

    Reading (`exact=False`) may straddle a block; writing (`exact=True`) a straddled one is refused with `ValueError`,
    except where the box ends with the tensor (`shape`) in a short last block. For block scales and packed formats.
    """
    out = []
    for d, ((lo, hi), g) in enumerate(zip(box, grain, strict=True)):
        last = shape is not None and hi == shape[d]
        if exact and (lo % g or (hi % g and not last)):
            raise ValueError(
                f"box {box} splits a block of {g} along dimension {d}; cut at multiples of the grain {tuple(grain)}, "
                "or give all of a block to one place"
            )
        out.append((lo // g, -(-hi // g)))
    return tuple(out)


# Strided storage


def terms(box: Box, strides: Sequence[int]) -> Terms:
    """(stride, size) of the dimensions longer than one, widest stride first, contiguous neighbours merged."""
    out: list[tuple[int, int]] = []
    for stride, size in sorted(((s, hi - lo) for s, (lo, hi) in zip(strides, box, strict=True) if hi - lo > 1)):
        if out and stride == out[-1][0] * out[-1][1]:
            out[-1] = (out[-1][0], out[-1][1] * size)
        else:
            out.append((stride, size))
    return tuple(reversed(out))


def extent(box: Box, strides: Sequence[int]) -> int:
    """Addresses spanned from the first element to one past the last."""
    return 1 + sum((hi - lo - 1) * s for (lo, hi), s in zip(box, strides, strict=True))


def nested(box: Box, strides: Sequence[int]) -> bool:
    """Whether strides are positive and each exceeds the extent of all smaller ones (dimensions of size 1 ignored)."""
    span = 1
    for stride, size in sorted((s, hi - lo) for s, (lo, hi) in zip(strides, box, strict=True) if hi - lo > 1):
        if stride < span:
            return False
        span += (size - 1) * stride
    return True


@lru_cache(maxsize=1 << 14)
def collide(delta: int, a: Terms, b: Terms) -> bool:
    """Whether strided set `a` at address 0 and strided set `b` at address `delta` share an address.

    Solves sum(a_i * x_i) - sum(b_j * y_j) = delta for bounded integers, widest stride first; equal strides merge to one
    variable, and range and greatest-common-divisor tests prune, so that the interleavings of real models (gate/up,
    QKV, stacked and transposed experts) are decided in a few steps. Cached because every layer asks the same.
    """
    ranges: dict[int, list[int]] = {}
    for stride, size in a:
        ranges.setdefault(stride, [0, 0])[1] += size - 1
    for stride, size in b:
        ranges.setdefault(stride, [0, 0])[0] -= size - 1
    variables = [(s, *ranges[s]) for s in sorted(ranges, reverse=True)]
    least, most, divisor = [0], [0], [0]  # of the sum over variables k.., built from the narrowest up
    for s, lo, hi in reversed(variables):
        least.append(least[-1] + s * lo)
        most.append(most[-1] + s * hi)
        divisor.append(math.gcd(divisor[-1], s))
    least.reverse(), most.reverse(), divisor.reverse()

    def solvable(k: int, rest: int) -> bool:
        if not least[k] <= rest <= most[k]:
            return False
        if k == len(variables):
            return True
        if rest % divisor[k]:
            return False
        s, lo, hi = variables[k]
        first = max(lo, -((most[k + 1] - rest) // s))
        last = min(hi, (rest - least[k + 1]) // s)
        return any(solvable(k + 1, rest - x * s) for x in range(first, last + 1))

    return solvable(0, delta)


def colliding(spots: Sequence[tuple[int, Terms]]) -> tuple[int, int] | None:
    """Indices of the first two strided sets (address, terms) that share an address, None when none do.

    Sorted by address, so only sets whose spans interleave reach the exact test.
    """
    order = sorted(range(len(spots)), key=lambda i: spots[i][0])
    open_: list[tuple[int, int]] = []  # (end of span, index) of earlier sets that reach past the current address
    for i in order:
        start, mine = spots[i]
        open_ = [(end, j) for end, j in open_ if end > start]
        for _, j in open_:
            if collide(start - spots[j][0], spots[j][1], mine):
                return j, i
        open_.append((start + 1 + sum((size - 1) * s for s, size in mine), i))
    return None


def count_below(address: int, ordered: Terms) -> int:
    """How many elements of a nested strided set at address 0 lie below `address` (>= 0); `ordered` widest first."""
    count = 0
    for k, (stride, size) in enumerate(ordered):
        digit, address = divmod(address, stride)
        if digit >= size:  # everything under this prefix lies below
            return (count + 1) * math.prod(n for _, n in ordered[k:])
        count = count * size + digit
    return count + (1 if address > 0 else 0)
