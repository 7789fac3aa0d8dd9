"""Attention in rows that hold several documents, without a mask: each document becomes a row of its own.

A mask over the whole row costs the square of the row, though almost all of it is forbidden: 2,048 tokens of sixty
answers are 4.2 M scores a head, of which 0.2 M count. Here documents of similar length are laid side by side for the
attention alone (everything else works on the packed tokens), padded at the end, where causality hides the padding from
every real query. On a CPU that is all; a GPU's fused attention takes the mask, as does a compiled model, which would be
compiled again for every new set of lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Documents"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
FILLED = 0.75  # of a group's longest: a shorter document begins the next group
SHORT = 32  # below this length it is not worth a group of its own


@dataclass(frozen=True)
class Documents:
    """Where the tokens of a micro-batch [B, S] go.

    gather: for each group [D, W], as int64 [D * W], the flat token b * S + s of each place; padding repeats a token.
    widths: W of each group.
    places: int64 [B * S], where in all groups, one behind the other, each token is.
    """

    gather: tuple[Tensor, ...]
    widths: tuple[int, ...]
    places: Tensor

    @classmethod
    def of(cls, documents_BS: Tensor) -> Documents:
        """The documents of each row: runs of equal ids (padding, too, is one)."""
        ids = documents_BS.cpu().numpy()
        starts = np.ones(ids.shape, bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        first = np.flatnonzero(starts)
        lengths = np.diff(first, append=ids.size)
        gather, widths = [], []
        places, end = np.empty(ids.size, np.int64), 0
        for group in _groups(lengths):
            width = int(lengths[group[0]])
            within = np.arange(width)
            index = first[group][:, None] + np.minimum(within, lengths[group][:, None] - 1)
            real = within < lengths[group][:, None]
            places[index[real]] = end + np.flatnonzero(real)
            gather.append(torch.from_numpy(index.reshape(-1)))
            widths.append(width)
            end += index.size
        return cls(tuple(gather), tuple(widths), torch.from_numpy(places))

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attention` (causal) within each document. q [B, S, N, d], k and v [B, S, K, d] -> [B, S, N, d]."""
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        out, end = [], 0
        for index, width in zip(self.gather, self.widths, strict=True):
            places = self.places - end  # of this group's tokens; others are beyond its ends
            rows = [_Rows.apply(x, index, places).unflatten(0, (-1, width)) for x in flat]
            out.append(attention(*rows).flatten(0, 1))
            end += len(index)
        return _Tokens.apply(torch.cat(out), self.places).view(q.shape)


def _groups(lengths: np.ndarray) -> list[Sequence[int]]:
    """Documents by falling length, cut where one would fill less than `FILLED` of its row."""
    order = np.argsort(-lengths, kind="stable")
    groups: list[list[int]] = []
    for document in order.tolist():
        longest = lengths[groups[-1][0]] if groups else 0
        if not groups or (lengths[document] < FILLED * longest and longest > SHORT):
            groups.append([])
        groups[-1].append(document)
    return groups


class _Rows(torch.autograd.Function):
    """Tokens [T, ...] -> places [P, ...]. Nothing flows back from padding, whose output nobody reads."""

    @staticmethod
    def forward(ctx, x, index, places):
        ctx.save_for_backward(places)
        ctx.size = len(index)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        here = (places >= 0) & (places < ctx.size)
        out = grad.new_zeros((len(places), *grad.shape[1:]))
        tokens = here.nonzero().squeeze(1)
        return out.index_copy_(0, tokens, grad.index_select(0, places[tokens])), None, None


class _Tokens(torch.autograd.Function):
    """Places [P, ...] -> tokens [T, ...]; each token is in one place."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        return grad.new_zeros((ctx.size, *grad.shape[1:])).index_copy_(0, places, grad), None
