"""Grouped-query causal attention (Ainslie et al. 2023), heads cut over tp.

Legend: B batch, S sequence, N query heads here, K key/value heads here, R = N / K, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytron.models.arch import DecoderConfig
from raytron.models.layers.norm import RMSNorm
from raytron.models.layers.rotary import rotate
from raytron.parallel.collectives import Axis
from raytron.parallel.tensor import ColumnParallelLinear, Cut, RowParallelLinear

__all__ = ["Attention", "CoreAttention", "Sequences"]

# Up to this length plain matrix products beat scaled_dot_product_attention on a CPU, forward and backward: the scores
# of one micro-batch still fit the cache hierarchy, and gradients need no recomputation.
LONGEST_MATH = 1024


@dataclass(frozen=True)
class Sequences:
    """What the layers must know of the micro-batch besides hidden states.

    batch, length: B and S; cos, sin: rotary table [S, 1, d] or [B, S, 1, d];
    blocked: None for plain causal attention, else bool [B, 1, S, S], true where attention is forbidden.
    """

    batch: int
    length: int
    cos: Tensor
    sin: Tensor
    blocked: Tensor | None = None


class CoreAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with a causal mask. q [B, S, N, d], k and v [B, S, K, d] -> [B, S, N, d]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Tensor:
        if q.is_cuda or q.shape[1] > LONGEST_MATH:
            return self._fused(q, k, v, blocked)
        return self._math(q, k, v, blocked)

    @staticmethod
    def _fused(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if blocked is None else ~blocked
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    @staticmethod
    def _math(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Tensor:
        B, S, N, d = q.shape
        K = k.shape[2]
        R = N // K
        q_BKRSd = q.view(B, S, K, R, d).permute(0, 2, 3, 1, 4) * d**-0.5
        k_BKdS, v_BKSd = k.permute(0, 2, 3, 1), v.transpose(1, 2)
        scores = (q_BKRSd.reshape(B * K, R * S, d) @ k_BKdS.reshape(B * K, d, S)).view(B, K, R, S, S)
        if blocked is None:
            blocked = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
        else:
            blocked = blocked.unsqueeze(1)
        weights = scores.masked_fill(blocked, -torch.inf).softmax(-1, dtype=_softmax_dtype(scores)).to(v.dtype)
        out = weights.view(B * K, R * S, S) @ v_BKSd.reshape(B * K, S, d)
        return out.view(B, K, R, S, d).permute(0, 3, 1, 2, 4).reshape(B, S, N, d)


def _softmax_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


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
        qkv = self.qkv(x).view(seq.batch, seq.length, N + 2 * K, d)
        if self.q_norm is None:
            qk, v = qkv.split((N + K, K), dim=2)
        else:
            q, k, v = qkv.split((N, K, K), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        q, k = rotate(qk, seq.cos.to(qk.dtype), seq.sin.to(qk.dtype)).split((N, K), dim=2)
        out = self.core_attention(q, k, v, seq.blocked)
        return self.out(out.reshape(seq.batch * seq.length, N * d))
