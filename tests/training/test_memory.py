"""What a run will need, against what it takes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raytron.config import ParallelConfig, RecomputeConfig, TrainConfig
from raytron.models import PRESETS, build
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from raytron.training import DTYPES, TrainEngine
from raytron.training.memory import estimate_memory, flops_per_token
from tests.models.hugging_face import random_model
from tests.training.engines import ARCHS, LENGTH, batches, config, kept_bytes, make


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("zero", "twins"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=4), Mesh(dp=2, tp=2)], ids=str)
def test_weights_gradients_and_optimizer_are_exact(mesh, zero, twins, precision):
    chosen = config(precision, parallel={"tp": mesh.tp, "zero": zero, "twins": twins})
    for arch in ARCHS.values():
        estimate = estimate_memory(arch, mesh, chosen, LENGTH)
        engines = [
            TrainEngine(
                build(arch, World.sketch(mesh, rank), parallel=chosen.parallel, dtype=DTYPES[precision]), chosen
            )
            for rank in range(mesh.size)
        ]
        for kind, held in {
            "weights": [nbytes(e.model.weights) for e in engines],
            "gradients": [nbytes(e.grads) for e in engines],
            "optimizer": [nbytes(*e.optimizer.values()) for e in engines],
        }.items():
            assert getattr(estimate, kind) == max(held), kind


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_activations_are_of_the_right_size(mode):
    chosen = config("fp32", micro=8, recompute=RecomputeConfig(mode))
    engine, estimate = make(chosen=chosen), estimate_memory(ARCHS["untied"], Mesh(), chosen, LENGTH)
    kept = kept_bytes(engine, batches(engine, "untied", 0)[0])
    assert 0.5 < estimate.activations / kept < 2.5


def test_the_busiest_rank_counts():
    """The last of two stages holds the head, the first keeps more micro-batches."""
    arch, chosen = PRESETS["llama3.2-1b"], TrainConfig(parallel=ParallelConfig(pp=2), precision="bf16")
    both = estimate_memory(arch, Mesh(pp=2), chosen, 2048)
    whole = estimate_memory(arch, Mesh(), chosen, 2048)
    assert whole.weights / 2 < both.weights < whole.weights
    assert both.total == sum((both.weights, both.gradients, both.optimizer, both.activations))
    assert "GiB per rank (weights" in str(both)


def test_splitting_needs_less_and_more_at_a_time_needs_more():
    arch = PRESETS["llama3-8b"]

    def total(mesh: Mesh, micro: int = 1, length: int = 4096, mode: str = "none", **parallel) -> int:
        chosen = TrainConfig(
            parallel=ParallelConfig(tp=mesh.tp, pp=mesh.pp, **parallel), precision="bf16", global_batch_size=64,
            micro_batch_size=micro, recompute=RecomputeConfig(mode),
        )  # fmt: skip
        return estimate_memory(arch, mesh, chosen, length).total

    base = total(Mesh(dp=4))
    assert total(Mesh(dp=4, tp=2)) < base
    assert total(Mesh(dp=4, pp=2)) < base
    assert total(Mesh(dp=4), zero=False) > base > total(Mesh(dp=8))
    assert total(Mesh(dp=4), micro=2) > base
    assert total(Mesh(dp=4), length=8192) > base
    assert total(Mesh(dp=4), mode="full") < total(Mesh(dp=4), mode="selective") <= base
    # 8 billion parameters in bf16 with fp32 gradients, masters and moments do not fit 80 GB
    assert total(Mesh()) > 16 * 8.03e9


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(ValueError, match=r"not divisible by parallel\.tp 3"):
        estimate_memory(PRESETS["llama3-8b"], Mesh(tp=3), TrainConfig(), 128)


@pytest.mark.parametrize("length", [16, 48])
def test_model_flops_equal_a_count_of_the_products(length):
    """PyTorch counts every product of a forward and backward, all of the attention's square; ours counts half of it."""
    drawn = {
        "model_type": "llama", "vocab_size": 37, "hidden_size": 24, "head_dim": 8, "intermediate_size": 20,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    from raytron.models import llama

    arch, theirs = llama.from_hf(drawn), random_model(drawn)
    tokens_BT = torch.zeros(2, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        theirs(tokens_BT).logits.sum().backward()
    ours, matrices = flops_per_token(arch, length), flops_per_token(arch, 0)
    assert counter.get_total_flops() / tokens_BT.numel() == pytest.approx(2 * ours - matrices, rel=0.02)
