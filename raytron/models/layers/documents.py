"""Attention in rows that hold several documents, without a mask: each document becomes a row of its own.

A mask over the whole row costs the square of the row, though almost all of it is forbidden: 2,048 tokens of sixty
answers are 4.2 M scores a head, of which 0.2 M count. Here documents of similar length are laid side by side for the
attention alone (everything else works on the packed tokens), padded at the end, where causality hides the padding from
every real query. A document that continues another one, as the answers to one prompt do, has the other's tokens in
front of it here, and only here. On a CPU that is all; a GPU's fused attention takes the mask, as does a compiled model,
which would be compiled again for every new set of lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Documents"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
FILLED = 0.75  # of a group's longest: a shorter document begins the next group
SHORT = 32  # below this length it is not worth a group of its own


@dataclass(frozen=True)
class Documents:
    """Where the tokens of a micro-batch [B, S] go.

    gather: for each group [D, W], as int64 [D, W], the flat token b * S + s of each place; padding repeats a token.
    places: int64 [B * S], where in all groups, one behind the other, each token's output is.
    """

    gather: tuple[Tensor, ...]
    places: Tensor

    @classmethod
    def of(cls, documents_BS: Tensor, parents_BS: Tensor | None = None) -> Documents:
        """Documents are runs of equal ids in a row (padding, too, is one); parents as `MicroBatch.parent_ids_BS`."""
        ids = documents_BS.cpu().numpy()
        parents = ids if parents_BS is None else parents_BS.cpu().numpy()
        sequences = _sequences(ids, parents)
        places, end, gather = np.empty(ids.size, np.int64), 0, []
        for group in _groups(sequences):
            width = len(group[0])
            index = np.stack([np.pad(tokens, (0, width - len(tokens)), mode="edge") for tokens in group])
            real = np.arange(width) < np.array([[len(tokens)] for tokens in group])
            places[index[real]] = end + np.flatnonzero(real)  # of a shared token's outputs, which are equal, any
            gather.append(torch.from_numpy(index))
            end += index.size
        return cls(tuple(gather), torch.from_numpy(places))

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attention` (causal) within each document. q [B, S, N, d], k and v [B, S, K, d] -> [B, S, N, d]."""
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        out = [attention(*(_take(x, index) for x in flat)).flatten(0, 1) for index in self.gather]
        return _take(torch.cat(out), self.places).view(q.shape)


def _sequences(ids: np.ndarray, parents: np.ndarray) -> list[np.ndarray]:
    """The flat tokens of each document, its parent's first; a parent has none of its own."""
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = np.flatnonzero(starts)
    tokens = np.split(np.arange(ids.size), first[1:])
    row = first // max(ids.shape[1], 1)
    names = list(zip(row.tolist(), ids.flat[first].tolist(), strict=True))
    above = list(zip(row.tolist(), parents.flat[first].tolist(), strict=True))
    number = {name: at for at, name in enumerate(names)}
    parent = [at if above[at] == names[at] else number[above[at]] for at in range(len(names))]
    shared = {up for at, up in enumerate(parent) if up != at}
    own = [at for at in range(len(names)) if at not in shared]
    return [tokens[at] if parent[at] == at else np.concatenate((tokens[parent[at]], tokens[at])) for at in own]


def _groups(sequences: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Sequences by falling length, cut where one would fill less than `FILLED` of its row."""
    groups: list[list[np.ndarray]] = []
    for tokens in sorted(sequences, key=len, reverse=True):
        longest = len(groups[-1][0]) if groups else 0
        if not groups or (len(tokens) < FILLED * longest and longest > SHORT):
            groups.append([])
        groups[-1].append(tokens)
    return groups


def _take(x_THd: Tensor, index: Tensor) -> Tensor:
    """x[index], whose gradient adds up where an index is repeated: `embedding`'s does so fastest on a CPU."""
    return F.embedding(index, x_THd.flatten(1)).unflatten(-1, x_THd.shape[1:])
