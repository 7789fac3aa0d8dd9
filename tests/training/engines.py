"""Small engines and batches for the tests of this room."""

from __future__ import annotations

import torch

from raytron.config import OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig
from raytron.data.loader import MicroBatch
from raytron.models import build
from raytron.models.arch import DecoderConfig
from raytron.parallel.collectives import World
from raytron.parallel.layout import only
from raytron.training import DTYPES, TrainEngine

BATCH, LENGTH = 8, 12
ARCHS = {
    # Two key/value heads, an odd vocabulary, three layers.
    "untied": DecoderConfig(
        vocab_size=37, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    ),
    # Tied ends, biases and QK norms, a vocabulary smaller than four ranks' padding.
    "tied": DecoderConfig(
        family="qwen2", vocab_size=5, hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, tie_word_embeddings=True, qk_norm=True,
        qkv_bias=True, initializer_range=0.2,
    ),
}  # fmt: skip


def config(precision: str = "fp64", micro: int = 2, steps: int = 100, lr: float = 1e-2, **more) -> TrainConfig:
    parallel = ParallelConfig(bucket_mb=0.005, **more.pop("parallel", {}))
    optimizer = OptimizerConfig(lr=lr, min_lr=lr / 10, **more.pop("optimizer", {}))
    schedule = more.pop("schedule", ScheduleConfig(kind="constant"))
    return TrainConfig(
        parallel=parallel, optimizer=optimizer, schedule=schedule, precision=precision, global_batch_size=BATCH,
        micro_batch_size=micro, steps=steps, **more,
    )  # fmt: skip


def make(
    arch: str = "untied", world: World | None = None, chosen: TrainConfig | None = None, seed: int = 7
) -> TrainEngine:
    chosen = chosen or config()
    model = build(ARCHS[arch], world, parallel=chosen.parallel, dtype=DTYPES[chosen.precision], seed=seed)
    return TrainEngine(model, chosen)


def global_batch(arch: str, step: int) -> MicroBatch:
    """Masked tokens, and in odd steps documents whose positions start anew."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, ARCHS[arch].vocab_size, (BATCH, LENGTH + 1), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) > 0.2).float()
    documents = (torch.arange(LENGTH) > 7).int().expand(BATCH, -1)
    positions = (torch.arange(LENGTH) % 8).expand(BATCH, -1)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], mask, *((positions, documents) if step % 2 else (None, None)))


def batches(engine: TrainEngine, arch: str, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch, in the order of `GlobalBatches`."""
    batch, dp, size = global_batch(arch, step), engine.world.axis("dp"), engine.config.micro_batch_size
    starts = range(dp.index * size, BATCH, dp.size * size)
    return [batch.map(lambda t, start=start: t[start : start + size]) for start in starts]


def canonical(engine: TrainEngine, flat: torch.Tensor | None = None) -> dict[tuple, torch.Tensor]:
    """(tensor, box) -> elements of this rank's weights, or of a buffer laid out like them, as copies."""
    flat = engine.model.weights if flat is None else flat
    held = only(engine.model.layout(), places=[f"rank-{engine.world.rank}"])
    return {
        (name, piece.box): flat.as_strided([b - a for a, b in piece.box], piece.strides, piece.offset).clone()
        for name, piece in held
    }


def bits(tensor: torch.Tensor) -> bytes:
    """Of a tensor that is not a scalar."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def kept_bytes(engine: TrainEngine, batch: MicroBatch) -> int:
    """What a forward keeps for its backward: each storage once, weights left out."""
    weights, kept = engine.model.weights.untyped_storage().data_ptr(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine._forward(batch, 0, None, engine._minimise)
    assert loss.requires_grad  # its graph has held every storage until here, so that no address came twice
    return sum(kept.values())
