"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from raytron.parallel.collectives import Axis
from raytron.parallel.tensor import Replicated

__all__ = ["RMSNorm"]


class RMSNorm(Replicated):
    """x / rms(x) * weight over the last dim; statistics in fp32 for half-precision input.

    `partial`: each tp rank normalises only some tokens or heads, so the weight's gradients are summed over tp.
    """

    def __init__(self, name: str, size: int, eps: float, tp: Axis, *, partial: bool) -> None:
        super().__init__(f"{name}.weight", (size,), tp, partial=partial)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
