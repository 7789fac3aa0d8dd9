"""The loss of fine-tuning is transformers' over labels of -100, and no packing or split changes it or its gradients."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from raytron.checkpoint import save_pretrained
from raytron.config import (
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScalingConfig,
    SFTConfig,
    SFTDataConfig,
)
from raytron.data import GlobalBatches, build_sft_datasets, prepare_examples
from raytron.models import build
from raytron.models.arch import DecoderConfig
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from raytron.training import DTYPES, TrainEngine
from raytron.training.reshape import Change
from raytron.training.seating import Seating
from raytron.training.sft import SFTTask
from tests.models.hugging_face import canonical

ARCH = DecoderConfig(
    vocab_size=257, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
PAIRS = [("q" * (1 + 3 * i % 8), f"{i}" * (1 + i % 6)) for i in range(16)]
LENGTH, BATCH = 24, 8


@pytest.fixture
def config(tmp_path) -> SFTConfig:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in PAIRS))
    data = SFTDataConfig(
        path=str(tmp_path / "pairs.jsonl"),
        sequence_length=LENGTH,
        held_out=4,
        tokenizer="byte",
        cache_path=str(tmp_path / "cache"),
    )
    return SFTConfig(
        data=data,
        global_batch_size=BATCH,
        micro_batch_size=2,
        steps=3,
        precision="fp64",
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3),
        evaluation=EvalConfig(batches=4),
        run=RunConfig(storage_path=str(tmp_path)),
    )


def gradients(config: SFTConfig, trim: int | None = None, **changes):
    """(vote, gradient of each tensor) of all examples in one global batch, in rows of one form or the other."""
    data = replace(config.data, held_out=0, **changes)
    train, _ = build_sft_datasets(data, prepare_examples(data, "byte"), BATCH, epochs=1)
    config = replace(config, data=data, global_batch_size=len(train))
    engine = TrainEngine(build(ARCH, dtype=DTYPES[config.precision], seed=7), config)
    batches = GlobalBatches(train, len(train), config.micro_batch_size, LENGTH, trim)
    vote = engine.vote(engine.forward_backward(batches.read(0)))
    slots = {slot.param: slice(slot.offset, slot.offset + slot.numel) for slot in engine.model.slots}
    return vote, canonical(engine.model, lambda param: (engine.grads[slots[param]] / vote.tokens).view(param.shape))


@pytest.mark.parametrize(("precision", "limit"), [("fp64", 2e-6), ("fp32", 1e-5)])
@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradients_are_those_of_transformers_with_labels_of_minus_100(
    config, tmp_path, packing, precision, limit
):
    from transformers import AutoModelForCausalLM

    config = replace(config, precision=precision)
    # In fp64, too, transformers normalises, takes the softmax and the logits' loss in fp32.
    vote, grads = gradients(config, packing=packing)
    save_pretrained(build(ARCH, dtype=DTYPES[precision], seed=7), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=DTYPES[precision], attn_implementation="eager"
    )
    rows, labels = [], []
    for prompt, response in PAIRS:
        ids = [*prompt.encode(), *response.encode(), 256]
        rows.append(ids + [0] * (LENGTH - len(ids)))
        labels.append([-100] * len(prompt) + ids[len(prompt) :] + [-100] * (LENGTH - len(ids)))
    mask = torch.tensor([[i < len(p) + len(r) + 1 for i in range(LENGTH)] for p, r in PAIRS]).long()
    loss = theirs(torch.tensor(rows), attention_mask=mask, labels=torch.tensor(labels)).loss
    loss.backward()
    assert vote.tokens == sum(len(response) + 1 for _, response in PAIRS)
    assert vote.loss == pytest.approx(loss.item(), abs=limit)
    wanted = {name: param.grad for name, param in theirs.named_parameters()}
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=limit)


def test_packing_trimming_and_micro_batches_change_nothing(config):
    (vote, grads), *others = (
        gradients(replace(config, micro_batch_size=micro), trim, packing=packing)
        for micro, packing, trim in ((1, False, None), (4, False, None), (4, False, 4), (1, True, None), (2, True, 1))
    )
    for other, found in others:
        assert other.tokens == vote.tokens
        assert other.loss == pytest.approx(vote.loss, abs=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-12)


def trained(world: World, config: SFTConfig, prepared, until: int, resume: bool = False):
    """(losses, held-out loss, weights) of a task on this rank; it saves at the end."""
    task = SFTTask(world, config, ARCH, prepared, f"{config.run.storage_path}/checkpoints-{config.run.name}")
    if resume:
        task.load()
    losses = [task.train_step() for _ in range(until - task.engine.counters.step)]
    held_out = task.evaluate()
    weights = {name: tensor.numpy().copy() for name, tensor in canonical(task.engine.model).items()}
    task.save(wait=True)
    task.close()
    return [r and (r.loss, r.consumed_tokens) for r in losses], held_out and (held_out.loss, held_out.tokens), weights


@pytest.mark.parametrize("packing", [pytest.param(True, marks=pytest.mark.slow), False])
def test_ranks_and_micro_batches_compute_the_same_run(ranks, config, packing):
    """Rows of micro-batches differ in width where they are not packed, for pipelines and sequence parallelism too."""
    config = replace(config, data=replace(config.data, packing=packing))
    prepared = prepare_examples(config.data, "byte")
    config = replace(config, run=replace(config.run, name="one"))
    losses, held_out, weights = trained(World.single(), config, prepared, 3)
    assert held_out[1] == sum(len(response) + 1 for _, response in PAIRS[:4])
    for mesh in (Mesh(dp=2), Mesh(tp=2), Mesh(pp=2)):
        other = replace(
            config,
            micro_batch_size=1,
            scaling=ScalingConfig(num_workers=2),
            parallel=ParallelConfig(tp=mesh.tp, pp=mesh.pp),
            run=replace(config.run, name=str(mesh)),
        )
        found = ranks.run(trained, mesh, other, prepared, 3)
        assert np.allclose(found[0][0], losses, rtol=0, atol=1e-10)
        assert found[0][1] == pytest.approx(held_out)
        if mesh.dp > 1:
            for *_, own in found:
                for name, tensor in weights.items():
                    np.testing.assert_allclose(own[name], tensor, rtol=0, atol=1e-10)


def test_a_run_that_was_cut_goes_on_to_the_bit(config):
    """Across an epoch's end, in both forms of rows."""
    for packing in (True, False):
        chosen = replace(config, steps=6, precision="fp32", data=replace(config.data, packing=packing))
        prepared = prepare_examples(chosen.data, "byte")
        whole, cut = (replace(chosen, run=replace(chosen.run, name=f"{name}{packing}")) for name in ("whole", "cut"))
        losses, held_out, weights = trained(World.single(), whole, prepared, 6)
        before, *_ = trained(World.single(), cut, prepared, 2)
        after, again, final = trained(World.single(), cut, prepared, 6, resume=True)
        assert before + after == losses
        assert again == held_out
        assert all((final[name] == tensor).all() for name, tensor in weights.items())


def reshaped(world: World, config: SFTConfig, prepared) -> list[tuple[float, int] | None]:
    """What `trained` says of losses, of a task that changes from dp to tp after the first step, and back."""
    task, places = SFTTask(world, config, ARCH, prepared, f"{config.run.storage_path}/none"), ("left", "right")
    losses, old = [task.train_step()], Seating(world.mesh, places)
    for mesh in (Mesh(tp=2), world.mesh):
        new = World(mesh, world.rank, world._store, prefix=f"{world._prefix}-tp{mesh.tp}")
        change = Change(old, Seating(mesh, places))
        task.reshape(new, new, places[world.rank], change)
        task.adopt()
        old = change.new
        losses.append(task.train_step())
        task.evaluate()
    task.close()
    return [r and (r.loss, r.consumed_tokens) for r in losses]


@pytest.mark.parametrize("packing", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_that_changes_shape_trains_on_the_same_rows(ranks, config, packing):
    """Rows are cut to a width that tensor parallelism divides, whatever it is by then."""
    chosen = replace(config, micro_batch_size=1, data=replace(config.data, packing=packing))
    prepared = prepare_examples(chosen.data, "byte")
    losses, *_ = trained(World.single(), replace(chosen, run=replace(chosen.run, name="still")), prepared, 3)
    found = ranks.run(reshaped, Mesh(dp=2), replace(chosen, scaling=ScalingConfig(num_workers=2)), prepared)
    assert np.allclose(found[0], losses, rtol=0, atol=1e-10)


def test_the_model_named_brings_its_tokenizer():
    assert SFTConfig(model=ModelConfig(path="here")).tokenizer == "here"
    assert SFTConfig(model=ModelConfig(path="here"), data=SFTDataConfig(tokenizer="there")).tokenizer == "there"
    assert SFTConfig().tokenizer == "byte"
    with pytest.raises(ValueError, match=r"epochs is 0; it must be at least 1"):
        SFTConfig(epochs=0)
