"""Recomputing activations changes what is kept, not what is computed."""

from __future__ import annotations

import pytest

from raytron.config import RecomputeConfig
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from tests.training.engines import batches, canonical, config, kept_bytes, make

KINDS = {
    "none": RecomputeConfig(),
    "selective": RecomputeConfig("selective"),
    "several": RecomputeConfig("selective", ("core_attention", "mlp", "input_norm")),
    "full": RecomputeConfig("full"),
}


def gradients(world: World | None, kind: str, parallel: dict):
    """Of this rank, over the global batch."""
    engine = make("tied", world, config(recompute=KINDS[kind], parallel=parallel))
    engine.forward_backward(batches(engine, "tied", 1))
    return {key: grad.numpy() for key, grad in canonical(engine, engine.grads).items()}


def test_every_kind_gives_the_same_gradients():
    wanted = gradients(None, "none", {})
    for kind in KINDS:
        for key, grad in gradients(None, kind, {}).items():
            assert abs(grad - wanted[key]).max() == 0, (kind, key)


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_it_works_with_a_pipeline_over_cut_layers(ranks, schedule):
    """Weight gradients may be deferred, and collectives run again in the backward."""
    mesh, parallel = Mesh(pp=2, tp=2), {"pp": 2, "tp": 2, "schedule": schedule}
    wanted = ranks.run(gradients, mesh, "none", parallel)
    for kind in ("several", "full"):
        for got, expected in zip(ranks.run(gradients, mesh, kind, parallel), wanted, strict=True):
            assert all(abs(got[key] - expected[key]).max() == 0 for key in expected), kind


def test_the_more_is_recomputed_the_less_is_kept():
    engines = [make(chosen=config(recompute=KINDS[kind])) for kind in ("none", "selective", "full")]
    none, selective, full = (kept_bytes(engine, batches(engine, "untied", 1)[0]) for engine in engines)
    assert full < 0.7 * selective < 0.7 * none


def test_an_unknown_module_is_named():
    with pytest.raises(ValueError, match=r"recompute.modules: no module named 'mlps'; this model has attention, .*mlp"):
        make(chosen=config(recompute=RecomputeConfig("selective", ("attention", "mlps"))))
