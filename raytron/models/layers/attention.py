"""Grouped-query causal attention (Ainslie et al. 2023), heads cut over tp.

Legend: B batch, S sequence, N query heads here, K key/value heads here, R = N / K, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytron.models.arch import DecoderConfig
from raytron.models.layers.documents import Documents
from raytron.models.layers.norm import RMSNorm
from raytron.models.layers.rotary import rotate
from raytron.parallel.collectives import Axis
from raytron.parallel.tensor import ColumnParallelLinear, Cut, RowParallelLinear
from raytron.precision import NATIVE_BF16

__all__ = ["Attention", "CoreAttention", "Sequences"]

# Up to this length plain matrix products beat scaled_dot_product_attention on a CPU, forward and backward: the kept
# weights of one layer stay small, and the backward need not compute them again.
LONGEST_MATH = 1024
QUERY_BLOCKS = 4  # runs of queries that see only the keys up to their own end: 5/8 of the whole square
SMALLEST_BLOCK = 64


@dataclass(frozen=True)
class Sequences:
    """What the layers must know of a training micro-batch besides hidden states; `PagedSequences` is inference's.

    batch, length: B and S; cos, sin: rotary table [S, 1, d] or [B, S, 1, d];
    blocked: None for plain causal attention, else bool [B, 1, S, S], true where attention is forbidden.
    documents: instead of `blocked`, where each document's tokens are: attention is causal within each.
    wanted: rows the head is asked for; None is all of them.
    """

    batch: int
    length: int
    cos: Tensor
    sin: Tensor
    blocked: Tensor | None = None
    documents: Documents | None = None
    wanted: Tensor | None = None

    def attend(self, layer: Attention, qk_THd: Tensor, v_TKd: Tensor) -> Tensor:
        """Queries and keys [T, N + K, d] turned by their positions, values [T, K, d] -> [T, N * d]."""
        N, K, d = layer.heads, layer.groups, layer.head_dim
        qk = qk_THd.view(self.batch, self.length, N + K, d)
        q, k = rotate(qk, self.cos.to(qk.dtype), self.sin.to(qk.dtype)).split((N, K), dim=2)
        v = v_TKd.view(self.batch, self.length, K, d)
        if self.documents is None:
            out = layer.core_attention(q, k, v, self.blocked)
        else:
            out = self.documents.attend(partial(layer.core_attention, blocked=None), q, k, v)
        return out.reshape(self.batch * self.length, N * d)


class CoreAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with a causal mask. q [B, S, N, d], k and v [B, S, K, d] -> [B, S, N, d]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Tensor:
        if q.is_cuda or q.shape[1] > LONGEST_MATH:
            return self._fused(q, k, v, blocked)
        return _CausalAttention.apply(q, k, v, blocked)

    @staticmethod
    def _fused(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if blocked is None else ~blocked
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)


class _CausalAttention(torch.autograd.Function):
    """Attention as matrix products over runs of queries, the softmax weights kept for the backward.

    Query rows are ordered (position, head of the group), so that a run of positions is a run of rows and the heads of a
    group share one product with their key. Rows: G = B * K groups of S * R.
    """

    @staticmethod
    def forward(ctx, q_BSNd, k_BSKd, v_BSKd, blocked):
        B, S, N, d = q_BSNd.shape
        K = k_BSKd.shape[2]
        wide = _product_dtype(q_BSNd.dtype)
        q, k, v = _rows(q_BSNd, K, wide), _rows(k_BSKd, K, wide), _rows(v_BSKd, K, wide)
        weights, out = [], torch.empty_like(q)
        for start, stop in _runs(S):
            run = slice(start * (N // K), stop * (N // K))
            scores = torch.baddbmm(q.new_empty(()), q[:, run], k[:, :stop].mT, beta=0, alpha=d**-0.5)
            _forbid(scores, start, stop, blocked, (B, K, N // K))
            weights.append(scores.softmax(-1, dtype=_softmax_dtype(wide)).to(wide))
            out[:, run] = weights[-1] @ v[:, :stop]
        ctx.save_for_backward(q, k, v, *weights)
        ctx.dtypes = q_BSNd.dtype, (B, S, N, d)
        return _unrows(out, B, S, q_BSNd.dtype)

    @staticmethod
    def backward(ctx, grad_BSNd):
        q, k, v, *weights = ctx.saved_tensors
        dtype, (B, S, N, d) = ctx.dtypes
        K = k.shape[0] // B
        grad = _rows(grad_BSNd, K, q.dtype)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, stop), weight in zip(_runs(S), weights, strict=True):
            run = slice(start * (N // K), stop * (N // K))
            grad_v[:, :stop].baddbmm_(weight.mT, grad[:, run])
            grad_scores = torch._softmax_backward_data(grad[:, run] @ v[:, :stop].mT, weight, -1, weight.dtype)
            grad_q[:, run] = torch.baddbmm(q.new_empty(()), grad_scores, k[:, :stop], beta=0, alpha=d**-0.5)
            grad_k[:, :stop].baddbmm_(grad_scores.mT, q[:, run], alpha=d**-0.5)
        return *(_unrows(x, B, S, dtype) for x in (grad_q, grad_k, grad_v)), None


def _runs(length: int) -> list[tuple[int, int]]:
    step = max(SMALLEST_BLOCK, -(-length // QUERY_BLOCKS))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _rows(x_BSNd: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[B, S, K * R, d] -> [B * K, S * R, d], contiguous."""
    B, S, N, d = x_BSNd.shape
    return x_BSNd.view(B, S, groups, N // groups, d).transpose(1, 2).reshape(B * groups, -1, d).to(dtype).contiguous()


def _unrows(x_GRd: Tensor, batch: int, length: int, dtype: torch.dtype) -> Tensor:
    """[B * K, S * R, d] -> [B, S, K * R, d]."""
    groups, d = x_GRd.shape[0] // batch, x_GRd.shape[-1]
    return x_GRd.view(batch, groups, length, -1, d).transpose(1, 2).reshape(batch, length, -1, d).to(dtype)


def _forbid(scores: Tensor, start: int, stop: int, blocked: Tensor | None, sizes: tuple[int, int, int]) -> None:
    """Set to -inf, in place, what queries [start, stop) may not see of keys [0, stop)."""
    B, K, R = sizes
    view = scores.view(B, K, stop - start, R, stop)
    if blocked is not None:
        view.masked_fill_(blocked[:, :, start:stop, None, :stop], -torch.inf)
        return
    future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=scores.device).triu(1)
    view[..., start:].masked_fill_(future[:, None, :], -torch.inf)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 and not NATIVE_BF16 else dtype


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Attention(nn.Module):
    """Fused QKV projection, rotary positions, core attention, output projection.

    Each tp rank holds whole heads; with fewer key/value heads than ranks, neighbouring ranks hold the same one.
    Forward: x_TD -> y_TD (its share of the tokens under sequence parallelism).
    """

    def __init__(self, prefix: str, arch: DecoderConfig, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        heads, groups, d = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
        if heads % tp.size:
            raise ValueError(
                f"num_attention_heads {heads} is not divisible by parallel.tp {tp.size}; choose a tp that divides it"
            )
        key, value = (Cut.even(name, groups * d, tp, unit=d) for name in ("k_proj", "v_proj"))
        self.qkv = ColumnParallelLinear(
            prefix,
            [Cut.even("q_proj", heads * d, tp, unit=d), key, value],
            arch.hidden_size,
            tp,
            sequence_parallel=sequence_parallel,
            std=arch.initializer_range,
            bias=arch.qkv_bias,
        )
        self.out = RowParallelLinear(
            f"{prefix}o_proj",
            heads * d,
            arch.hidden_size,
            tp,
            sequence_parallel=sequence_parallel,
            std=arch.initializer_range / (2 * arch.num_hidden_layers) ** 0.5,
        )
        self.heads, self.groups, self.head_dim = heads // tp.size, key.rows // d, d
        self.core_attention = CoreAttention()
        norm = {"eps": arch.rms_norm_eps, "tp": tp, "partial": True}
        self.q_norm = RMSNorm(f"{prefix}q_norm", d, **norm) if arch.qk_norm else None
        self.k_norm = RMSNorm(f"{prefix}k_norm", d, **norm) if arch.qk_norm else None

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        N, K, d = self.heads, self.groups, self.head_dim
        qkv = self.qkv(x).view(-1, N + 2 * K, d)
        if self.q_norm is None:
            qk, v = qkv.split((N + K, K), dim=1)
        else:
            q, k, v = qkv.split((N, K, K), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        return self.out(seq.attend(self, qk, v))
