"""Keys and values of sequences under way, in blocks of a few tokens, and a batch that attends to them.

Blocks are handed out by the scheduler (PagedAttention, Kwon et al. 2023); a sequence's block table says where its
tokens are, so sequences grow without being moved and those that begin alike share blocks. The tokens of a step stand in
one row each, whatever they are: a chunk of a prompt or the newest token of an output.

Legend: T tokens of the step, N query heads here, K key/value heads here, d head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from raytron.models import kernels
from raytron.models.layers.rotary import rotate

if TYPE_CHECKING:
    from raytron.models.layers.attention import Attention

__all__ = ["Cache", "PagedSequences", "block_bytes", "make_caches"]


@dataclass(frozen=True)
class Cache:
    """One attention layer's: keys [blocks, K, d, block], values [blocks, K, block, d padded to whole vectors].

    Keys stand transposed, so that one query element meets a block's keys as one run of memory.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, layer: Attention, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """Room for `blocks` blocks of one layer; nothing in it is read before it is written."""
        K, d = layer.groups, layer.head_dim
        shapes = ((blocks, K, d, block_size), (blocks, K, block_size, kernels.padded(d)))
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))


def block_bytes(layers: Iterable[Attention], block_size: int, dtype: torch.dtype) -> int:
    """Bytes one block takes in all of `layers`."""
    elements = sum(layer.groups * (layer.head_dim + kernels.padded(layer.head_dim)) for layer in layers)
    return elements * block_size * dtype.itemsize


def make_caches(
    layers: Iterable[Attention], blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> dict[Attention, Cache]:
    """A cache for each of `layers`."""
    return {layer: Cache.of(layer, blocks, block_size, dtype, device) for layer in layers}


@dataclass(frozen=True)
class PagedSequences:
    """What the layers must know of a step of the inference engine; `Sequences` is training's.

    sequence_T, position_T: int32, the row of `tables` each token belongs to, and where in its sequence it stands;
    tokens of a sequence stand together, in order. tables: int32 [sequences, width], blocks of each.
    cos, sin: fp32 [positions, d / 2]. wanted: int64, rows the head is asked for; None is all of them.
    """

    sequence_T: Tensor
    position_T: Tensor
    tables: Tensor
    caches: Mapping[Attention, Cache]
    cos: Tensor
    sin: Tensor
    wanted: Tensor | None = None

    def attend(self, layer: Attention, qk_THd: Tensor, v_TKd: Tensor) -> Tensor:
        """Queries and keys [T, N + K, d] turned by their positions, values [T, K, d] -> [T, N * d]; fills the cache."""
        q, k = qk_THd.split((layer.heads, layer.groups), dim=1)
        cache = self.caches[layer]
        where = (self.sequence_T, self.position_T, self.tables)
        if kernels.usable(q):
            return kernels.attend(q, k, v_TKd, cache.keys, cache.values, self.cos, self.sin, *where)
        return _attend(q, k, v_TKd, cache, self.cos, self.sin, *where)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, cos: Tensor, sin: Tensor, sequence: Tensor, position: Tensor,
    tables: Tensor,
) -> Tensor:  # fmt: skip
    """What the kernel does, in torch: on a GPU, and where the kernel did not compile."""
    (T, N, d), block = q.shape, cache.keys.shape[-1]
    at = position.long()
    c, s = (torch.cat((x[at], x[at]), dim=-1).unsqueeze(1).to(q.dtype) for x in (cos, sin))
    q, k = rotate(q, c, s), rotate(k, c, s)
    blocks = tables[sequence.long(), at // block].long()
    cache.keys[blocks, :, :, at % block] = k
    cache.values[blocks, :, at % block, :d] = v
    out = q.new_empty((T, N * d))
    runs, counts = torch.unique_consecutive(sequence, return_counts=True)
    for run, rows in zip(runs.tolist(), torch.arange(T, device=q.device).split(counts.tolist()), strict=True):
        length = int(at[rows[-1]]) + 1
        used = tables[run, : -(-length // block)].long()
        keys = cache.keys[used].permute(1, 0, 3, 2).flatten(1, 2)[:, :length]
        values = cache.values[used].transpose(0, 1).flatten(1, 2)[:, :length, :d]
        mask = torch.arange(length, device=q.device) <= at[rows].unsqueeze(1)
        mine = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1), keys, values, mask, enable_gqa=keys.shape[0] != N
        )
        out[rows] = mine.transpose(0, 1).flatten(1)
    return out
