"""What a rank of a training run will need, computed before a machine is rented. Shapes come from the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from raytron.config import TrainConfig
from raytron.models.layers.attention import LONGEST_MATH
from raytron.models.registry import family_of
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from raytron.training.engine import DTYPES

__all__ = ["MemoryEstimate", "estimate_memory", "flops_per_token"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes the busiest rank needs. `activations` is an estimate (Korthikanti et al. 2022), the rest is exact."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in self.__dataclass_fields__)
        return f"{self.total / 2**30:.2f} GiB per rank ({parts})"


def estimate_memory(arch: Any, mesh: Mesh, config: TrainConfig, sequence_length: int) -> MemoryEstimate:
    """Memory of the rank that needs most. Building the sketches also checks that every rank's share can be cut.

    Raises ValueError if the mesh does not divide the model.
    """
    estimates = []
    for rank in range(mesh.unit):
        if mesh.coords(rank).cp:
            continue
        model = family_of(arch).model(arch, World.sketch(mesh, rank), parallel=config.parallel, device="meta")
        estimates.append(_of_rank(arch, mesh, config, sequence_length, model))
    return max(estimates, key=lambda e: e.total)


def _of_rank(arch: Any, mesh: Mesh, config: TrainConfig, length: int, model: Any) -> MemoryEstimate:
    numel, dtype = model.weights.numel(), DTYPES[config.precision]
    trained = numel - model.frozen
    wide = 8 if dtype == torch.float64 else 4
    shards = min(mesh.dp, 2 if config.parallel.twins else 1)
    owned = trained // mesh.dp * shards if config.parallel.zero else trained
    copies = 2 + (dtype == torch.bfloat16)
    layers = sum(len(chunk.layers) for chunk in model.chunks)
    in_flight = min(config.micro_batches(mesh.dp, uneven=True), mesh.pp)
    per_layer = activation_bytes_per_layer(arch, config, mesh, length)
    logits = config.micro_batch_size * length * arch.vocab_size // mesh.tp * 4 * 2
    last = any(chunk.last for chunk in model.chunks)
    return MemoryEstimate(
        weights=numel * dtype.itemsize,
        gradients=trained * wide,
        optimizer=owned * wide * copies,
        activations=layers * per_layer * in_flight + last * logits,
    )


def activation_bytes_per_layer(arch: Any, config: TrainConfig, mesh: Mesh, length: int) -> int:
    """Bytes one layer keeps for the backward of one micro-batch: 34 s b h of half-precision, shared over tp."""
    tokens, width = config.micro_batch_size * length, DTYPES[config.precision].itemsize
    if config.recompute.mode == "full":
        return tokens * arch.hidden_size * width
    share = mesh.tp if config.parallel.sequence_parallel else 1
    outside = tokens * arch.hidden_size * 10 * width // 2 // share
    heads = arch.num_attention_heads * arch.head_dim + 2 * arch.num_key_value_heads * arch.head_dim
    inside = tokens * (2 * heads + 4 * arch.intermediate_size) * width // mesh.tp
    # Short sequences keep attention weights, in fp32: runs of queries by the keys up to their end, 5/8 of the square.
    short = config.recompute.mode == "none" and length <= LONGEST_MATH
    scores = tokens * length * arch.num_attention_heads * 4 * 5 // 8 if short else 0
    return outside + inside + scores // mesh.tp


def flops_per_token(arch: Any, length: int) -> float:
    """Model FLOPs of forward and backward per token: 6 per weight in a matrix product, plus causal attention.

    Attention counts the half of the scores that the mask leaves, as Megatron-Core and Megatron-Bridge do now; older
    published numbers (and torchtitan's) count all of them. Recomputation does not count. A frozen weight takes 4: no
    gradient of it is computed; adapters are too small to count.
    """
    head = arch.num_attention_heads * arch.head_dim
    groups = arch.num_key_value_heads * arch.head_dim
    layer = arch.hidden_size * (2 * head + 2 * groups + 3 * arch.intermediate_size)
    matrices = arch.num_hidden_layers * layer + arch.hidden_size * arch.vocab_size
    return (4.0 if arch.lora.rank else 6.0) * matrices + 6.0 * arch.num_hidden_layers * length * head
