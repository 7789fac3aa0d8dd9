"""Any layout computes the step that one process computes: loss, every gradient, and parameters after three updates.

Models are as deep as a layout needs and no deeper: ranks outnumber cores here, and wait for each other.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch

from raytron.config import OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig
from raytron.data.loader import MicroBatch
from raytron.models import build
from raytron.models.arch import DecoderConfig
from raytron.parallel.mesh import Mesh
from raytron.training import DTYPES, TrainEngine

BATCH, LENGTH, STEPS = 8, 12, 3
ARCHS = {
    # 4 query heads on 2 key/value heads: replicated at tp 4. Odd vocabulary.
    "untied": DecoderConfig(
        vocab_size=37, hidden_size=32, intermediate_size=40, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    ),
    # One key/value head, tied ends, biases and QK norms, a vocabulary smaller than the padding of four ranks.
    "tied": DecoderConfig(
        family="qwen3", vocab_size=19, hidden_size=24, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, tie_word_embeddings=True, qk_norm=True,
        qkv_bias=True, initializer_range=0.2,
    ),
}  # fmt: skip


def arch_of(name: str, parallel: ParallelConfig) -> DecoderConfig:
    """One layer for each chunk where the ends are tied; else one more, so that stages are uneven."""
    chunks = max(2, parallel.pp * parallel.virtual_stages)
    return replace(ARCHS[name], num_hidden_layers=chunks + (name == "untied"))


def cases():
    for tp, pp, dp in itertools.product((1, 2, 4), (1, 2, 4), (1, 2)):
        if tp * pp * dp > 4:
            continue
        sequence = (False, True) if tp > 1 else (False,)
        zero = (False, True) if dp > 1 else (False,)
        kinds = [("1f1b", 1)] if pp == 1 else [("gpipe", 1), ("1f1b", 1), ("zero-bubble", 1)]
        kinds += [("gpipe", 2), ("interleaved-1f1b", 2), ("zero-bubble", 2)]
        for sp, z, (schedule, virtual) in itertools.product(sequence, zero, kinds):
            yield tp, pp, dp, sp, z, schedule, virtual


# Three of five belong to `make test-slow`, of every kind: a case has four ranks waiting for each other on two cores.
CASES = [case if i % 5 in (0, 2) else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases())]


def name_of(case: tuple) -> str:
    return "tp{}-pp{}-dp{}-sp{:d}-zero{:d}-{}-v{}".format(*case)


def global_batch(arch: DecoderConfig, step: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, arch.vocab_size, (BATCH, LENGTH + 1), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) > 0.2).float()
    documents = (torch.arange(LENGTH) > 7).int().expand(BATCH, -1)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], mask, None, documents if step % 2 else None)


def split(batch: MicroBatch, dp: int, index: int, size: int) -> list[MicroBatch]:
    """Megatron's order: consecutive runs of dp x size samples, one run of `size` for each dp rank."""
    starts = range(index * size, BATCH, dp * size)
    return [batch.map(lambda t, start=start: t[start : start + size]) for start in starts]


def run(world, arch: DecoderConfig, config: TrainConfig):
    """(losses, gradients of the first step, parameters after the last): canonical tensors of what this rank holds."""
    model = build(arch, world, parallel=config.parallel, dtype=DTYPES[config.precision], seed=7)
    engine = TrainEngine(model, config)
    losses, grads = [], {}
    for step in range(config.steps):
        batches = split(global_batch(arch, step), world.mesh.dp, world.coords.dp, config.micro_batch_size)
        if step == 0:
            counts = engine.forward_backward(batches)
            vote = engine.vote(counts)
            grads = pieces(engine, engine.grads / vote.tokens)
            engine.update(vote, config.optimizer.lr)
            engine.gather()
            losses.append(engine.publish(vote, config.optimizer.lr).loss)
        else:
            losses.append(engine.step(batches).loss)
    return losses, grads, pieces(engine, model.weights, everything=True)


def pieces(engine: TrainEngine, flat: torch.Tensor, everything: bool = False):
    """(name, box) -> elements, of what this rank's optimizer owns (or all it holds)."""
    me = f"rank-{engine.world.rank}"
    layout = engine.model.layout() if everything else engine.optimizer_layout()
    if not everything:
        flat = torch.cat([flat[a:b] for a, b in engine.intervals])
    held = {}
    for tensor, piece in layout.at(me):
        size = tuple(stop - start for start, stop in piece.box)
        held[tensor, piece.box] = flat.as_strided(size, piece.strides, piece.offset).clone().numpy()
    return held


def config(precision: str, micro: int = 2, clip: float = 0.5, **parallel) -> TrainConfig:
    return TrainConfig(
        parallel=ParallelConfig(bucket_mb=0.005, **parallel),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, clip_grad=clip),
        schedule=ScheduleConfig(kind="constant"),
        precision=precision,
        global_batch_size=BATCH,
        micro_batch_size=micro,
        steps=STEPS if precision == "fp64" else 1,
    )


@cache
def reference(arch: DecoderConfig, precision: str):
    from raytron.parallel.collectives import World

    losses, grads, params = run(World.single(), arch, config(precision, micro=BATCH))
    return losses, {n: g for (n, _), g in grads.items()}, {n: p for (n, _), p in params.items()}


def compare(got, want, limit: float) -> None:
    for (tensor, box), values in got.items():
        expected = want[tensor][tuple(slice(a, b) for a, b in box)]
        scale = abs(want[tensor]).max()
        assert abs(values - expected).max() <= limit * scale, f"{tensor} {box}"


def run_all(world, jobs):
    return [run(world, arch, chosen) for arch, chosen in jobs]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_any_layout_computes_the_same_step(ranks, case):
    tp, pp, dp, sp, zero, schedule, virtual = case
    options = {"tp": tp, "pp": pp, "virtual_stages": virtual, "schedule": schedule, "zero": zero}
    jobs = []
    for (name, micro), precision in itertools.product((("untied", 2), ("tied", 4)), ("fp64", "fp32")):
        chosen = config(precision, micro, sequence_parallel=sp, **options)
        jobs.append((arch_of(name, chosen.parallel), chosen))
    answers = ranks.run(run_all, Mesh(dp=dp, pp=pp, tp=tp), jobs)
    for (arch, chosen), *of_ranks in zip(jobs, *answers, strict=True):
        limit = {"fp64": 1e-9, "fp32": 1e-5}[chosen.precision]
        want_losses, want_grads, want_params = reference(arch, chosen.precision)
        for losses, grads, params in of_ranks:
            assert losses == pytest.approx(want_losses, rel=limit)
            compare(grads, want_grads, limit)
            if chosen.precision == "fp64":
                compare(params, want_params, limit)
        for want, got in ((want_grads, 1), (want_params, 2)):
            assert {tensor for answer in of_ranks for tensor, _ in answer[got]} == want.keys()
