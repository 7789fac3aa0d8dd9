"""SwiGLU feed-forward (Shazeer 2020), cut over tp."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytron.models.arch import DecoderConfig
from raytron.parallel.collectives import Axis
from raytron.parallel.tensor import ColumnParallelLinear, Cut, RowParallelLinear

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up fused in one product. Forward: x_TD -> y_TD.

    `kernel`: [gate | up] -> silu(gate) * up in place of torch's operations, see `ShardedModel.use`.
    """

    kernel: Callable[[Tensor], Tensor] | None = None

    def __init__(self, prefix: str, arch: DecoderConfig, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        size = arch.intermediate_size
        if size % tp.size:
            raise ValueError(f"intermediate_size {size} is not divisible by parallel.tp {tp.size}; choose another tp")
        self.gate_up = ColumnParallelLinear(
            prefix,
            [Cut.even("gate_proj", size, tp), Cut.even("up_proj", size, tp)],
            arch.hidden_size,
            tp,
            sequence_parallel=sequence_parallel,
            std=arch.initializer_range,
        )
        self.down = RowParallelLinear(
            f"{prefix}down_proj",
            size,
            arch.hidden_size,
            tp,
            sequence_parallel=sequence_parallel,
            std=arch.initializer_range / (2 * arch.num_hidden_layers) ** 0.5,
        )

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        return self.down((self.kernel or _swiglu)(gate_up))


def _swiglu(x_T2F: Tensor) -> Tensor:
    """silu(gate) * up of [gate | up]."""
    if torch.compiler.is_compiling():  # which fuses this into one pass each way, and stops at our function's `out=`
        gate, up = x_T2F.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(x_T2F)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [gate | up], and one gradient for both, so that nothing is concatenated."""

    @staticmethod
    def forward(ctx, x_T2F):
        ctx.save_for_backward(x_T2F)
        gate, up = x_T2F.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (x_T2F,) = ctx.saved_tensors
        gate, up = x_T2F.chunk(2, dim=-1)
        out = torch.empty_like(x_T2F)
        out_gate, out_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=out_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=out_gate)
        return out
