"""Rotary positions (Su et al. 2021), in the half-split form Hugging Face's checkpoints are stored for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raytron.models.arch import RopeScaling

__all__ = ["frequencies", "rotary_table", "rotate"]


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Inverse frequencies, fp32 [head_dim / 2], with Llama 3.1's scaling where given."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return inverse
    wavelength = 2 * math.pi / inverse
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    ramp = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return inverse * (ramp + (1.0 - ramp) / scaling.factor)


def rotary_table(positions: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [..., 1, head_dim] for positions [...]: the same value in both halves, ready to broadcast."""
    angle = positions.to(torch.float32).unsqueeze(-1) * inverse.to(positions.device)
    angle = torch.cat((angle, angle), dim=-1).unsqueeze(-2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., heads, head_dim] turned by its position's angles."""
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) on the two halves; the gradient turns back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    out, sin = x * cos, sin[..., :half]
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out
