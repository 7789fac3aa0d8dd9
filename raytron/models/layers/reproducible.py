"""The trainer's side of reproducible mode: the inference kernels' forward, with gradients.

The kernels give a row the same bits whatever it is computed with, so a model that trains through them computes exactly
the log-probabilities that the engine reported for the same tokens. Backwards are the ordinary ones: the bits of a
gradient are nobody's business but the layout's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from raytron.models import kernels
from raytron.models.layers.attention import Attention, Sequences
from raytron.models.layers.cache import Cache, PagedSequences
from raytron.models.layers.mlp import _SwiGLU
from raytron.models.layers.norm import _RMSNorm

__all__ = ["ReproducibleSequences", "linear", "rms_norm", "swiglu"]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return kernels.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        grad_x, grad_weight = grad @ weight if needed[0] else None, grad.mT @ x if needed[1] else None
        return grad_x, grad_weight, grad.sum(0) if needed[2] else None


class _KernelRMSNorm(_RMSNorm):
    @staticmethod
    def forward(ctx, x, weight, eps):
        _RMSNorm.forward(ctx, x, weight, eps)  # what the backward needs
        return kernels.rms_norm(x, weight, eps)


class _KernelSwiGLU(_SwiGLU):
    @staticmethod
    def forward(ctx, x_T2F):
        ctx.save_for_backward(x_T2F)
        return kernels.swiglu(x_T2F)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`kernels.linear`, differentiable."""
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else kernels.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.rms_norm`, differentiable."""
    return _KernelRMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else kernels.rms_norm(x, weight, eps)


def swiglu(x_T2F: Tensor) -> Tensor:
    """`kernels.swiglu`, differentiable."""
    return _KernelSwiGLU.apply(x_T2F) if torch.is_grad_enabled() else kernels.swiglu(x_T2F)


class _Attend(torch.autograd.Function):
    """Forward by the kernel, over a cache of this micro-batch alone; backward through the ordinary layer."""

    @staticmethod
    def forward(ctx, qk, v, layer, sequences):
        ctx.save_for_backward(qk, v)
        ctx.layer, ctx.plain = layer, sequences.plain
        return sequences.run(layer, qk, v)

    @staticmethod
    def backward(ctx, grad):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.plain.attend(ctx.layer, *inputs)
        return *torch.autograd.grad(out, inputs, grad), None, None


class ReproducibleSequences:
    """A training micro-batch whose attention is the engine's. `plain`: the same as the ordinary `Sequences`.

    cos, sin: fp32 [positions, d / 2]. starts_T: bool, where a token is the first of a document (or row); positions are
    counted from there.
    """

    def __init__(self, plain: Sequences, cos: Tensor, sin: Tensor, starts_T: Tensor) -> None:
        self.plain, self.wanted = plain, plain.wanted
        sequence = starts_T.long().cumsum(0) - 1
        first = starts_T.nonzero().squeeze(1)
        position = torch.arange(len(starts_T)) - first[sequence]
        lengths = torch.bincount(sequence)
        blocks = (lengths + kernels.KEYS - 1) // kernels.KEYS
        width = int(blocks.max())
        tables = (blocks.cumsum(0) - blocks).unsqueeze(1) + torch.arange(width)
        self._blocks = int(blocks.sum())
        where = (sequence.int(), position.int(), tables.int())
        self._paged = PagedSequences(*(x.contiguous() for x in where), {}, cos, sin)

    def attend(self, layer: Attention, qk_THd: Tensor, v_TKd: Tensor) -> Tensor:
        """As `Sequences.attend`."""
        if torch.is_grad_enabled():
            return _Attend.apply(qk_THd, v_TKd, layer, self)
        return self.run(layer, qk_THd, v_TKd)

    def run(self, layer: Attention, qk_THd: Tensor, v_TKd: Tensor) -> Tensor:
        """The forward, by the kernel."""
        cache = Cache.of(layer, self._blocks, kernels.KEYS, qk_THd.dtype, qk_THd.device)
        return replace(self._paged, caches={layer: cache}).attend(layer, qk_THd, v_TKd)
