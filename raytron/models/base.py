"""One rank's part of a model: its chunks, and the one flat buffer that all of its parameters are views of.

One buffer makes everything that moves weights a matter of offsets: gradients lie in a second buffer at the same
offsets, ZeRO shards are flat intervals of it, and the layout algebra needs nothing else. Matrices that are decayed come
first, norms and biases behind them, so an optimizer step is a handful of contiguous runs. In a model with adapters
what is frozen comes before what is trained, so that gradients and optimizer state are of the buffer's end alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from raytron.config import ParallelConfig
from raytron.models import kernels
from raytron.models.layers import reproducible as layers_reproducible
from raytron.models.layers.lora import LowRank, add_adapters
from raytron.models.layers.mlp import SwiGLU
from raytron.models.layers.norm import RMSNorm
from raytron.parallel.collectives import World
from raytron.parallel.layout import Layout, Piece, Place, Spec, only
from raytron.parallel.mesh import Mesh
from raytron.parallel.tensor import ParallelLinear, initialize_
from raytron.precision import BF16_INSTRUCTIONS, NATIVE_BF16, linear

__all__ = ["ShardedModel", "Slot", "chunk_layers"]

# Up to so many rows our own product is faster than the library's. Without bf16 instructions weights are widened as they
# are read, where the library would widen all of them first; of those instructions it has AVX512's.
if "avx512_bf16" in BF16_INSTRUCTIONS and "amx_bf16" not in BF16_INSTRUCTIONS:
    FEW_ROWS = {torch.float32: 2048, torch.bfloat16: 256}
else:
    FEW_ROWS = {torch.float32: 48, torch.bfloat16: 2 if NATIVE_BF16 else 64}
ALIGN = 64  # elements: slots start on a cache line in every dtype


def chunk_layers(layers: int, stages: int, virtual: int, given: tuple[int, ...] | None = None) -> list[range]:
    """Layer indices of each of the stages x virtual chunks, in model order; as even as it goes, or as `given`.

    Raises ValueError if a chunk would hold no layer, or `given` does not add up.
    """
    chunks = stages * virtual
    if layers < chunks:
        raise ValueError(
            f"{layers} layers cannot fill parallel pp x virtual_stages = {stages} x {virtual} = {chunks} chunks, a "
            "stage would hold no layer; use fewer stages"
        )
    if given is not None and sum(given) != layers:
        raise ValueError(f"parallel.layers_per_stage {given} adds up to {sum(given)}, the model has {layers} layers")
    counts = given or tuple(layers // chunks + (i < layers % chunks) for i in range(chunks))
    starts = [sum(counts[:i]) for i in range(chunks)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def fast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, without gradients, by whatever is fastest for so many rows."""
    return (kernels.linear if x.shape[0] <= FEW_ROWS[x.dtype] else linear)(x, weight, bias)


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the flat buffer: elements [offset, offset + numel)."""

    param: nn.Parameter
    offset: int
    numel: int


def rank_name(rank: int) -> Place:
    """The default place of a rank, for layouts that do not outlive it."""
    return f"rank-{rank}"


class ShardedModel(nn.Module):
    """One rank's part of a model.

    Args:
        arch: the family's architecture.
        world: this rank's seat; `World.sketch` builds the shapes of any rank anywhere.
        parallel: how layers are cut (tp and pp themselves are the mesh's).
        dtype, device: of the flat buffer; on "meta" no memory is taken.

    Attributes:
        chunks: the pipeline chunks held here, in model order.
        weights: flat buffer; every parameter is a view of it.
        slots: parameter by parameter, in buffer order.
        frozen: elements before what is trained; 0 unless the architecture has adapters, which are trained alone.
        trained: the slots behind them, offsets counted from there.
        decay_end: where the trained matrices end and norms and biases begin.
        compute_dtype: dtype of rotary tables.
        reproducible: whether every forward gives a token the same bits, see `use_kernels`.
        compiled: whether chunks are, and so are better given tensors of few shapes.
        origin: the directory that weights were read from, if they were.
    """

    def __init__(
        self,
        arch: Any,
        world: World | None = None,
        *,
        parallel: ParallelConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.arch, self.world = arch, world or World.single()
        self.parallel = parallel or ParallelConfig()
        self.compute_dtype = dtype
        self.reproducible = self.compiled = False
        self.origin: str | None = None
        device = self.world.device if device is None else torch.device(device)
        with torch.device("meta"):
            self.chunks = nn.ModuleList(self.make_chunks(self.world))
            if self.adapted:
                add_adapters(self.chunks, arch.lora)
        for module in self.chunks.modules():
            if isinstance(module, ParallelLinear):
                module.product = linear
        self.prepare()
        self._flatten(dtype, device)

    def use_kernels(self, reproducible: bool) -> ShardedModel:
        """Compute with the CPU's inference kernels, from now on.

        reproducible: always, so that a token's bits depend on nothing but the tokens before it, with gradients too; the
        trainer and the engine then agree to the bit. Otherwise where they are faster, without gradients.

        Raises ValueError for `reproducible` where the kernels do not run: on a GPU, in other dtypes than fp32 and bf16,
        without a C compiler.
        """
        if not kernels.usable(self.weights):
            if reproducible:
                raise ValueError(
                    "reproducible mode needs the CPU kernels: a model in fp32 or bf16 on the CPU, and a C compiler "
                    f"(gcc); this one is {self.dtype_name} on {self.weights.device}"
                )
            return self
        chosen = layers_reproducible if reproducible else kernels
        for module in self.chunks.modules():
            if hasattr(module, "product"):
                module.product = chosen.linear if reproducible else fast_linear
            elif isinstance(module, RMSNorm):
                module.kernel = chosen.rms_norm
            elif isinstance(module, SwiGLU):
                module.kernel = chosen.swiglu
        self.reproducible = reproducible
        return self

    def make_chunks(self, world: World) -> list[nn.Module]:
        """The chunks that `world`'s rank holds, built on the meta device. Families define this."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Set up what is derived from the architecture and is no parameter. Families define this."""
        raise NotImplementedError

    def tied_ends(self) -> nn.Parameter | None:
        """A parameter whose twin is at the other end of the pipeline, if this rank holds one."""
        return None

    def _flatten(self, dtype: torch.dtype, device: torch.device) -> None:
        sites = list(_sites(self.chunks))
        params = list(dict.fromkeys(param for _, _, param in sites))
        trained = {param: param.added or not self.adapted for param in params}
        ordered = sorted(params, key=lambda p: (trained[p], not p.decay))
        ends = list(itertools.accumulate(-(-p.numel() // ALIGN) * ALIGN for p in ordered))
        offsets = [0, *ends[:-1]]
        spots = list(zip(ordered, offsets, strict=True))
        self.frozen = next(at for p, at in spots if trained[p])
        quantum = ALIGN * self.world.mesh.dp  # so that every dp rank owns an equal, aligned share
        end = self.frozen + -(-(ends[-1] - self.frozen) // quantum) * quantum
        self.decay_end = next((at for p, at in spots if trained[p] and not p.decay), end)
        self.weights = torch.zeros(end, dtype=dtype, device=device)
        moved, self.slots = {}, []
        for param, offset in spots:
            new = nn.Parameter(self.weights[offset : offset + param.numel()].view(param.shape), trained[param])
            vars(new).update(vars(param))
            moved[param] = new
            self.slots.append(Slot(new, offset, param.numel()))
        self.trained = [Slot(s.param, s.offset - self.frozen, s.numel) for s in self.slots if s.offset >= self.frozen]
        self._size, self._shapes = end, [slot.param.shape for slot in self.slots]
        for module, name, param in sites:
            module._parameters[name] = moved[param]

    def allocate(self, room: bool) -> None:
        """Give the memory of the weights back, or take it anew, all zeros. For inference: `weights` is another."""
        self.weights = self.weights.new_zeros(self._size if room else 0)
        for slot, shape in zip(self.slots, self._shapes, strict=True):
            flat = self.weights[slot.offset : slot.offset + slot.numel]
            slot.param.data = flat.view(shape) if room else flat

    def initialize(self, seed: int, added: bool = False) -> ShardedModel:
        """Random weights that depend only on (seed, tensor name, position), whatever the layout.

        added: of adapters and new heads only; the rest is read from files.
        """
        for slot in self.slots:
            if slot.param.added or not added:
                initialize_(slot.param, seed)
        return self

    # Adapters

    @property
    def adapted(self) -> bool:
        """Whether the model has adapters, and all else is frozen."""
        return self.arch.lora.rank > 0

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Compute as the model does that the adapters are beside."""
        adapters = [module for module in self.chunks.modules() if isinstance(module, LowRank)]
        for adapter in adapters:
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.enabled = True

    def merged(self) -> torch.Tensor:
        """The weights with all adapters merged into them: a copy, or `weights` itself where there are none."""
        return self.merge_(self.weights.detach().clone()) if self.adapted else self.weights

    def merge_(self, flat: torch.Tensor) -> torch.Tensor:
        """Merge adapters in place, in a buffer laid out as `weights`, on any device; the adapters stay in it too."""
        views = {s.param: flat[s.offset : s.offset + s.numel].view(s.param.shape) for s in self.slots}
        for layer in self.chunks.modules():
            if isinstance(layer, ParallelLinear) and layer.adapter is not None:
                layer.adapter.merge_(views[layer.weight], views[layer.adapter.down], views[layer.adapter.up])
        return flat

    # Layouts

    def layout(self, place: Callable[[int], Place] = rank_name, version: int = 0) -> Layout:
        """Where the weights of *all* ranks of the mesh live, in each one's flat buffer "weights"."""
        return self._arrangement(place, version).layout

    def trained_layout(self, place: Callable[[int], Place] = rank_name, version: int = 0) -> Layout:
        """The same of what is trained."""
        layout, trained, _ = self._arrangement(place, version)
        return only(layout, trained) if self.adapted else layout

    def frozen_ends(self, place: Callable[[int], Place] = rank_name) -> Mapping[Place, int]:
        """`frozen` of all ranks."""
        return self._arrangement(place, 0).frozen

    def _arrangement(self, place: Callable[[int], Place], version: int) -> _Arrangement:
        return _arrangement(type(self), self.arch, self.world.mesh, self.parallel, self.dtype_name, place, version)

    @property
    def dtype_name(self) -> str:
        return str(self.weights.dtype).removeprefix("torch.")

    def num_parameters(self) -> int:
        """Canonical parameters held here, tied and replicated ones once, padding not counted."""
        parts = (part for slot in self.slots for part in slot.param.parts if not part.replica)
        return sum(math.prod(part.size) for part in parts)


def _sites(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for child in module.modules():
        for name, param in child._parameters.items():
            if param is not None:
                yield child, name, param


class _Arrangement(NamedTuple):
    """layout: of all weights. trained: names of what is trained. frozen: `ShardedModel.frozen`, by place."""

    layout: Layout
    trained: frozenset[str]
    frozen: Mapping[Place, int]


@lru_cache(maxsize=8)  # layouts are immutable, and a save, a load and a resize ask for the same few
def _arrangement(
    model: type[ShardedModel],
    arch: Any,
    mesh: Mesh,
    parallel: ParallelConfig,
    dtype: str = "float32",
    place: Callable[[int], Place] = rank_name,
    version: int = 0,
) -> _Arrangement:
    """The weights of a model on every rank of `mesh`, without building any: shapes come from the meta device.

    Ranks that differ only in dp or cp hold the same pieces at the same offsets, so one sketch serves them all.
    """
    tensors: dict[str, Spec] = {}
    trained: set[str] = set()
    frozen: dict[Place, int] = {}
    spots: dict[str, dict[tuple, list[int]]] = {}
    sizes: dict[tuple[Place, str], int] = {}
    for rank in range(mesh.unit):
        coords = mesh.coords(rank)
        if coords.cp:
            continue
        ranks = [mesh.rank(dp, coords.pp, cp, coords.tp) for dp in range(mesh.dp) for cp in range(mesh.cp)]
        sketch = model(arch, World.sketch(mesh, rank), parallel=parallel, device="meta")
        sizes.update({(place(r), "weights"): sketch.weights.numel() for r in ranks})
        frozen.update({place(r): sketch.frozen for r in ranks})
        trained.update(part.name for slot in sketch.trained for part in slot.param.parts)
        for slot in sketch.slots:
            for part in slot.param.parts:
                tensors.setdefault(part.name, Spec(part.shape, dtype))
                key = (part.box, slot.offset + part.offset, part.strides)
                spots.setdefault(part.name, {}).setdefault(key, []).extend(ranks)
    pieces = {
        name: tuple(
            Piece(box, "weights", offset, strides, tuple(map(place, sorted(ranks))))
            for (box, offset, strides), ranks in held.items()
        )
        for name, held in spots.items()
    }
    return _Arrangement(Layout(version, tensors, pieces, sizes), frozenset(trained), frozen)
