"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from raytron.parallel.collectives import Axis
from raytron.parallel.tensor import Replicated

__all__ = ["RMSNorm"]


class RMSNorm(Replicated):
    """x / rms(x) * weight over the last dim; statistics in fp32 for half-precision input.

    `partial`: each tp rank normalises only some tokens or heads, so the weight's gradients are summed over tp.
    `kernel`: (x, weight, eps) -> y in place of torch's operations, see `ShardedModel.use`.
    """

    kernel: Callable[[Tensor, Tensor, float], Tensor] | None = None

    def __init__(self, name: str, size: int, eps: float, tp: Axis, *, partial: bool) -> None:
        super().__init__(f"{name}.weight", (size,), tp, partial=partial)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x, self.weight, self.eps)
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """With y = x / r, r = sqrt(mean(x^2) + eps): dx = (g w - y mean(g w y)) / r and dw = sum(g y).

    Torch's CPU kernel is a chain of autograd operations, each a pass over memory; this is a third of the passes.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(weight.dtype if weight.dtype == torch.float64 else torch.float32)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        y = x * scale  # fp32 for half-precision x: scale is
        grad_weight = (grad * y).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        g = (grad * weight).to(scale.dtype)
        mean = torch.linalg.vecdot(g, y).unsqueeze(-1).div_(x.shape[-1])
        grad_x = g.addcmul_(y, mean, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight.to(weight.dtype) if grad_weight is not None else None, None
