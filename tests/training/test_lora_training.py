"""Training adapters: any layout computes the same steps, nothing else changes, and nothing else takes memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raytron.config import LoRAConfig, TrainConfig
from raytron.models import build
from raytron.models.layers.lora import is_adapter
from raytron.parallel.layout import only
from raytron.parallel.mesh import Mesh
from raytron.training import DTYPES, TrainEngine
from raytron.training.memory import estimate_memory
from tests.training.engines import ARCHS, batches, config

LORA = {
    "untied": LoRAConfig(rank=3, alpha=6),
    "tied": LoRAConfig(rank=2, alpha=4, rslora=True, target_modules=("k_proj", "o_proj", "up_proj")),
}
LAYOUTS = [
    pytest.param("untied", Mesh(tp=2), {"tp": 2}, marks=pytest.mark.slow),
    ("untied", Mesh(tp=4), {"tp": 4, "sequence_parallel": False}),  # heads of keys on two ranks each
    ("untied", Mesh(pp=2, dp=2), {"pp": 2, "schedule": "zero-bubble"}),
    pytest.param("untied", Mesh(tp=2, dp=2), {"tp": 2, "zero": False}, marks=pytest.mark.slow),
    ("tied", Mesh(tp=2, pp=2), {"tp": 2, "pp": 2}),
    ("tied", Mesh(dp=4), {}),
    pytest.param("tied", Mesh(tp=4), {"tp": 4}, marks=pytest.mark.slow),
    pytest.param("untied", Mesh(pp=2), {"pp": 2, "virtual_stages": 1, "schedule": "gpipe"}, marks=pytest.mark.slow),
]


def engine_of(arch: str, world, chosen: TrainConfig) -> TrainEngine:
    adapted = replace(ARCHS[arch], lora=LORA[arch])
    model = build(adapted, world, parallel=chosen.parallel, dtype=DTYPES[chosen.precision], seed=7)
    return TrainEngine(model, chosen)


def canonical(model, flat: torch.Tensor, shift: int = 0) -> dict:
    """(tensor, box) -> elements, of what is trained."""
    held = only(model.trained_layout(), places=[f"rank-{model.world.rank}"])
    spots = {(name, piece.box): piece for name, piece in held}
    views = {key: flat.as_strided([b - a for a, b in p.box], p.strides, p.offset - shift) for key, p in spots.items()}
    return {key: view.clone().numpy() for key, view in views.items()}


def run(world, arch: str, chosen: TrainConfig):
    """(losses, norms, gradients of the first step, adapters after the last, whether the rest stayed as it was)."""
    engine = engine_of(arch, world, chosen)
    model = engine.model
    frozen = model.weights[: model.frozen].clone()
    losses, norms, grads = [], [], {}
    for step in range(3):
        if step == 0:
            counts = engine.forward_backward(batches(engine, arch, step))
            vote = engine.vote(counts)
            if not engine.scatter:
                grads = canonical(model, engine.grads / vote.tokens, model.frozen)
            engine.update(vote, 1e-2)
            engine.gather()
            result = engine.publish(vote, 1e-2)
        else:
            result = engine.step(batches(engine, arch, step))
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms, grads, canonical(model, model.weights), torch.equal(frozen, model.weights[: model.frozen])


@pytest.mark.parametrize(("arch", "mesh", "parallel"), LAYOUTS)
def test_any_layout_trains_the_same_adapters(ranks, arch: str, mesh: Mesh, parallel: dict):
    ((losses, norms, grads, adapters, kept),) = ranks.run(run, Mesh(), arch, config(micro=1))
    assert kept
    assert all(norm > 0.01 for norm in norms)
    whole, of_grads = ({tensor: torch.from_numpy(value) for (tensor, _), value in x.items()} for x in (adapters, grads))
    assert {*map(is_adapter, whole)} == {True}
    for its_losses, its_norms, its_grads, its_adapters, its_kept in ranks.run(
        run, mesh, arch, config(micro=1, parallel=parallel)
    ):
        assert its_kept
        assert its_losses == pytest.approx(losses, rel=1e-9)
        assert its_norms == pytest.approx(norms, rel=1e-8)
        for found, wanted in ((its_adapters, whole), (its_grads, of_grads)):
            for (tensor, box), value in found.items():
                part = wanted[tensor][tuple(slice(a, b) for a, b in box)]
                mine = torch.from_numpy(value)
                torch.testing.assert_close(mine, part, rtol=1e-6, atol=1e-9, msg=lambda m, t=tensor: f"{t}: {m}")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-amp"])
def test_only_adapters_change_and_only_they_have_gradients_and_moments(precision: str):
    chosen = config(precision=precision, steps=20, lr=1e-2)
    engine = engine_of("untied", None, chosen)
    model, before = engine.model, engine.model.weights.clone()
    losses = [engine.step(batches(engine, "untied", 0)).loss for _ in range(15)]
    assert losses[-1] < losses[0] - 0.05
    assert torch.equal(model.weights[: model.frozen], before[: model.frozen])
    for slot in model.trained:
        assert not torch.equal(slot.param, before[model.frozen + slot.offset :][: slot.numel].view(slot.param.shape))
    adapters = model.weights.numel() - model.frozen
    assert adapters < model.frozen / 2
    assert {engine.grads.numel(), *(state.numel() for state in engine.optimizer.values())} == {adapters}
    assert all(s.param.grad is None and not s.param.requires_grad for s in model.slots if s.offset < model.frozen)
    estimate = estimate_memory(model.arch, Mesh(), chosen, 12)
    assert estimate.gradients == engine.grads.nbytes
    assert estimate.optimizer == sum(state.nbytes for state in engine.optimizer.values())


def test_layers_may_be_recomputed():
    from raytron.config import RecomputeConfig

    plain, again = (
        engine_of("untied", None, config(recompute=RecomputeConfig(mode=mode))) for mode in ("none", "full")
    )
    for engine in (plain, again):
        engine.forward_backward(batches(engine, "untied", 0))
    assert plain.grads.any()
    torch.testing.assert_close(again.grads, plain.grads)
