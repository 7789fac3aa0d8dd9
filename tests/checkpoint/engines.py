"""Engines to save and load: real models with every weight and moment a known function of its name and position."""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch

from raytron.config import ParallelConfig, TrainConfig
from raytron.data.loader import MicroBatch
from raytron.models import build
from raytron.models.arch import DecoderConfig
from raytron.parallel.collectives import World
from raytron.parallel.layout import Layout, only
from raytron.training import DTYPES, TrainEngine

ARCHS = {
    # Key/value heads fewer than four ranks, an odd vocabulary, uneven stages.
    "untied": DecoderConfig(
        vocab_size=37, hidden_size=32, intermediate_size=40, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, eos_token_id=3,
    ),
    "tied": DecoderConfig(
        family="qwen3", vocab_size=19, hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, tie_word_embeddings=True, qk_norm=True,
    ),
    "tiny": DecoderConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    ),
}  # fmt: skip


def make(
    world: World | None = None, arch: str = "untied", precision: str = "fp32", seed: int = 0, **parallel
) -> TrainEngine:
    """An engine at step `seed` whose content is that of `seed`; 0 leaves all zero."""
    config = ParallelConfig(**parallel)
    model = build(ARCHS[arch], world, parallel=config, dtype=DTYPES[precision])
    batch = 4 * model.world.mesh.dp
    engine = TrainEngine(model, TrainConfig(parallel=config, precision=precision, global_batch_size=batch))
    if seed:
        fill(engine, seed)
    return engine


def canonical(name: str, kind: str, seed: int, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor that an engine of `seed` holds parts of; bf16 weights are roundings of their masters."""
    kind = "weights" if kind == "master" else kind
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{kind}/{seed}".encode()))
    return torch.randn(layout.tensors[name].shape, generator=generator).to(dtype)


@lru_cache(maxsize=16)  # of the engines a test is working with
def layouts(engine: TrainEngine) -> tuple[Layout, Layout]:
    """Of this rank's weights and of its optimizer buffers."""
    place = [f"rank-{engine.world.rank}"]
    return only(engine.model.layout(), places=place), only(engine.optimizer_layout(), places=place)


def parts(engine: TrainEngine):
    """(kind, layout of this rank's part, flat buffer) of all that is saved."""
    weights, optimizer = layouts(engine)
    yield "weights", weights, engine.model.weights
    for name, buffer in engine.optimizer.items():
        yield name, optimizer, buffer


def views(layout: Layout, flat: torch.Tensor):
    for name, piece in layout:
        yield name, piece, flat.as_strided([hi - lo for lo, hi in piece.box], piece.strides, piece.offset)


def fill(engine: TrainEngine, seed: int) -> None:
    for kind, layout, flat in parts(engine):
        flat.zero_()
        for name, piece, view in views(layout, flat):
            whole = canonical(name, kind, seed, layout, flat.dtype)
            view.copy_(whole[tuple(slice(*bounds) for bounds in piece.box)])
    engine.record = engine.record | {"step": seed, "consumed_samples": 4 * seed, "norm_mean": seed / 3}


def differences(engine: TrainEngine, seed: int) -> list[str]:
    """What of the engine is not the content of `seed`, to the bit; padding included."""
    wrong = []
    for kind, layout, flat in parts(engine):
        rest = flat.clone()
        for name, piece, view in views(layout, flat):
            whole = canonical(name, kind, seed, layout, flat.dtype)
            if not torch.equal(view, whole[tuple(slice(*bounds) for bounds in piece.box)]):
                wrong.append(f"{kind} {name} {piece.box}")
        for _, _, view in views(layout, rest):
            view.zero_()
        if rest.any():
            wrong.append(f"padding of {kind}")
    return wrong


def batches(engine: TrainEngine, seed: int) -> list[MicroBatch]:
    """This step's micro-batches of a one-rank engine."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, engine.model.arch.vocab_size, (engine.micro_batches, 1, 9), generator=generator)
    return [MicroBatch(row[:, :-1], row[:, 1:], torch.ones(1, 8)) for row in tokens]
