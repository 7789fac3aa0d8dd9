"""Low-rank adapters (LoRA, Hu et al. 2021) beside the linear layers of any family.

    y = x W^T + scale (x A^T) B^T          A [rank, in], B [out, rank]; W is as it was, B starts at zero

All there is to know of an adapter follows from the parts that the layer's weight declares, so neither families nor
layers know of them: A has the columns that the weight has here, B its rows. Where tp cuts rows (column parallel) every
rank has all of A and sees a share of its gradient; where it cuts columns (row parallel) the same is true of B, which is
applied before the sum over tp. So adapters take no collective of their own, nor does merging them.

The scale multiplies x A^T, and sums are exact operations of their own: a row's bits then depend on that row alone,
whatever it is computed with, as those of the reproducible kernels do. Dropout is not offered: the engines of a
reinforced policy could not repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytron.config import LoRAConfig
from raytron.parallel.tensor import ParallelLinear, Part, Product, RowParallelLinear, parameter

__all__ = ["LowRank", "add_adapters", "is_adapter"]

A, B = "lora_A", "lora_B"


def is_adapter(name: str) -> bool:
    """Whether a canonical tensor is an adapter's."""
    return name.endswith((f".{A}.weight", f".{B}.weight"))


def add_adapters(model: nn.Module, lora: LoRAConfig) -> None:
    """Give every linear layer that `lora` names an adapter, on the current default device."""
    for layer in [module for module in model.modules() if isinstance(module, ParallelLinear)]:
        chosen = [i for i, part in enumerate(layer.weight.parts) if _stem(part).rpartition(".")[2] in lora.targets]
        if chosen:
            layer.adapter = LowRank(layer, chosen, lora)


def _stem(part: Part) -> str:
    return part.name.removesuffix(".weight")


class LowRank(nn.Module):
    """The adapters of one layer, which may be several stacked maps: one product with all A, one with each B.

    Forward: x [T, in], y [T, out] -> y with what is added to it (in place where no gradients are asked for).

    Attributes:
        down: A of every map that has an adapter, stacked [maps * rank, in]. up: B likewise [rows of the maps, rank].
        enabled: False passes y on as it is.
    """

    def __init__(self, layer: ParallelLinear, chosen: Sequence[int], lora: LoRAConfig) -> None:
        super().__init__()
        parts, tp = layer.weight.parts, layer.tp
        self.rank, self.scale, self.enabled = lora.rank, lora.scale, True
        self.sizes, self.chosen = [part.size[0] for part in parts], list(chosen)
        whole = {"replicas": tp.size, "replica": tp.index, "partial": tp.size > 1}
        by_row = isinstance(layer, RowParallelLinear)
        columns, downs, ups, row = parts[0].size[1], [], [], 0
        for k, part in enumerate(parts[i] for i in chosen):
            shape, box = (lora.rank, part.shape[1]), ((0, lora.rank), part.box[1])
            at = k * lora.rank * columns
            downs.append(Part(f"{_stem(part)}.{A}.weight", shape, box, at, (columns, 1), **({} if by_row else whole)))
            shape, box = (part.shape[0], lora.rank), (part.box[0], (0, lora.rank))
            own = {"replicas": part.replicas, "replica": part.replica, "partial": part.partial}
            at, strides = row * lora.rank, (lora.rank, 1)
            ups.append(Part(f"{_stem(part)}.{B}.weight", shape, box, at, strides, **(whole if by_row else own)))
            row += part.size[0]
        # PEFT's start: A uniform within 1 / sqrt(in), which kaiming_uniform_ calls a = sqrt(5).
        std = (3 * parts[0].shape[1]) ** -0.5
        more = {"decay": True, "added": True}
        self.down = parameter((len(chosen) * lora.rank, columns), downs, std=std, uniform=True, **more)
        self.up = parameter((row, lora.rank), ups, std=0.0, **more)

    def forward(self, x: Tensor, y: Tensor, product: Product) -> Tensor:
        if not self.enabled:
            return y
        low = (product(x, self.down, None) * self.scale).split(self.rank, -1)
        added = [product(h, up, None) for h, up in zip(low, self._ups(self.up), strict=True)]
        if not torch.is_grad_enabled():
            for i, more in zip(self.chosen, added, strict=True):
                y.narrow(-1, sum(self.sizes[:i]), self.sizes[i]).add_(more)
            return y
        maps = list(y.split(self.sizes, -1))
        for i, more in zip(self.chosen, added, strict=True):
            maps[i] = maps[i] + more
        return maps[0] if len(maps) == 1 else torch.cat(maps, -1)

    def _ups(self, up: Tensor) -> tuple[Tensor, ...]:
        return up.split([self.sizes[i] for i in self.chosen])

    @torch.no_grad()
    def merge_(self, weight: Tensor, down: Tensor, up: Tensor) -> None:
        """Add scale B A to the layer's weight in place; computed in fp32 (fp64 stays), rounded once."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        maps = weight.split(self.sizes)
        for i, a, b in zip(self.chosen, down.split(self.rank), self._ups(up), strict=True):
            maps[i].copy_(torch.addmm(maps[i].to(wide), b.to(wide), a.to(wide), alpha=self.scale))
