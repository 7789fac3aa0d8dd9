"""Documents in rows: which go behind each other, and how a row of them looks to a model. SFT and RL share it.

A document of n tokens takes n - 1 places of a row, since its last token predicts nothing: place p holds token p and the
label p + 1. Numbers about a token (its loss mask, its advantage) stand where that token is the label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Beginnings", "Rows", "first_fit", "lay"]


class Beginnings(NamedTuple):
    """What documents have in common: the first `tokens[i]` of document i are those of all with its `family[i]`.

    tokens, family: int64 [N]; `tokens` is 0 where a document shares nothing.
    """

    tokens: np.ndarray
    family: np.ndarray


@dataclass(frozen=True)
class Rows:
    """R rows of W places; places behind a row's documents are padding.

    tokens_RW, labels_RW: int64, 0 in padding. positions_RW: int64, from 0 in each document and in the padding.
    documents_RW: int32, documents counted over all rows, -1 in padding; what documents share has a number below that.
    parents_RW: int32, the number of what a document shares with others, else its own. index_RW: int64, where the label
    stands in the flat arrays, -1 in padding and in what is shared. columns: float32 by name, 0 there.
    """

    tokens_RW: np.ndarray
    labels_RW: np.ndarray
    positions_RW: np.ndarray
    documents_RW: np.ndarray
    parents_RW: np.ndarray
    index_RW: np.ndarray
    columns: Mapping[str, np.ndarray]


def lay(
    tokens: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    rows: Sequence[Sequence[int]],
    width: int,
    columns: Mapping[str, np.ndarray],
    shared: Beginnings | None = None,
) -> Rows:
    """Lay documents into rows of `width` places.

    Args:
        tokens, columns: flat arrays over the tokens of all documents.
        starts, lengths: document i is tokens [starts[i], starts[i] + lengths[i]).
        rows: the documents of each row, which together have at most `width` places.
        shared: what is laid once, in front of the first of neighbours that have it in common.
    """
    shape = (len(rows), width)
    out_tokens, labels, positions = (np.zeros(shape, np.int64) for _ in range(3))
    documents, index = np.full(shape, -1, np.int32), np.full(shape, -1, np.int64)
    parents = documents.copy()
    out_columns = {name: np.zeros(shape, np.float32) for name in columns}
    number, above = 0, -1

    def put(r: int, at: int, start: int, begin: int, stop: int, names: tuple[int, int], counted: bool) -> int:
        """Places [begin, stop) of the document at `start`; returns where the next begins."""
        here, a, n = slice(at, at + stop - begin), start + begin, stop - begin
        out_tokens[r, here], labels[r, here] = tokens[a : a + n], tokens[a + 1 : a + n + 1]
        positions[r, here], (documents[r, here], parents[r, here]) = np.arange(begin, stop), names
        if counted:
            index[r, here] = np.arange(a + 1, a + n + 1)
            for name, values in columns.items():
                out_columns[name][r, here] = values[a + 1 : a + n + 1]
        return at + n

    for r, row in enumerate(rows):
        at, family = 0, None
        for i in row:
            common = 0 if shared is None else int(shared.tokens[i])
            if common and family != shared.family[i]:
                family, above = shared.family[i], above - 1
                at = put(r, at, int(starts[i]), 0, common, (above, above), False)
            family = family if common else None
            names = (number, above if common else number)
            at = put(r, at, int(starts[i]), common, int(lengths[i]) - 1, names, True)
            number += 1
        positions[r, at:] = np.arange(width - at)
    return Rows(out_tokens, labels, positions, documents, parents, index, out_columns)


def first_fit(sizes: np.ndarray, order: Iterable[int], budget: int, window: int | None = None) -> list[list[int]]:
    """The items of `order` in rows of at most `budget`, each in the first open row that has room (Johnson 1973).

    A larger item gets a row of its own. window: only so many of the newest rows stay open, so that the work grows with
    the number of items and not with its square; None leaves all open.
    """
    rows: list[list[int]] = []
    used: list[int] = []
    for item in order:
        size = int(sizes[item])
        oldest = 0 if window is None else max(0, len(rows) - window)
        at = next((at for at in range(oldest, len(rows)) if used[at] + size <= budget), None)
        if at is None:
            rows.append([item])
            used.append(size)
        else:
            rows[at].append(item)
            used[at] += size
    return rows
