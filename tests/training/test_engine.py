"""One step of training: what it equals, what it leaves alone, and what every rank agrees on."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from raytron.config import GuardConfig, ParallelConfig, ScheduleConfig, TrainConfig
from raytron.data.loader import MicroBatch
from raytron.models import build
from raytron.parallel.collectives import GaveUp, World
from raytron.parallel.mesh import Mesh
from raytron.training import TrainEngine, TrainingStopped, learning_rate
from tests.training.engines import ARCHS, BATCH, LENGTH, batches, canonical, config, global_batch, make

# Against PyTorch's own optimizer


def reference(arch: str, chosen: TrainConfig, steps: int):
    """(losses, norms, parameters) of a plain loop: whole batch, torch.optim.AdamW, clip_grad_norm_."""
    dtype = {"fp64": torch.float64, "fp32": torch.float32}[chosen.precision]
    model, options = build(ARCHS[arch], dtype=dtype, seed=7), chosen.optimizer
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # norms and biases
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)
    losses, norms = [], []
    for step in range(steps):
        batch = global_batch(arch, step)
        logits = model(batch.tokens_BS, batch.position_ids_BS, batch.document_ids_BS)
        nll = F.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten(), reduction="none")
        loss = (nll * batch.loss_mask_BS.flatten()).sum() / batch.loss_mask_BS.sum()
        adamw.zero_grad()
        loss.backward()
        clip = options.clip_grad or torch.inf
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, chosen.steps, options, chosen.schedule)
        adamw.step()
        losses.append(loss.item())
    return losses, norms, {part.name: part.view(slot.param.data) for slot in model.slots for part in slot.param.parts}


@pytest.mark.parametrize(("precision", "limit"), [("fp64", 1e-11), ("fp32", 1e-3)])
@pytest.mark.parametrize("clip", [0.0, 0.1], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("arch", ARCHS)
def test_steps_equal_a_plain_loop_with_torchs_adamw(arch, clip, precision, limit):
    """Norms and biases undecayed, the schedule followed, and any size of micro-batch."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2)
    for micro in (1, 4, BATCH):
        chosen = config(
            precision, micro, steps=6, schedule=schedule, optimizer={"clip_grad": clip, "weight_decay": 0.3}
        )
        losses, norms, params = reference(arch, chosen, steps=4)
        engine = make(arch, chosen=chosen)
        results = [engine.step(batches(engine, arch, step)) for step in range(4)]
        assert [r.loss for r in results] == pytest.approx(losses, rel=min(limit, 1e-5))
        assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-6 if precision == "fp64" else 1e-4)
        for (name, _), values in canonical(engine).items():
            scale = params[name].abs().max().item()
            torch.testing.assert_close(values, params[name], rtol=0, atol=limit * scale, msg=name)


def run_norms(world: World, arch: str, chosen: TrainConfig) -> list[float]:
    engine = make(arch, world, chosen)
    return [engine.step(batches(engine, arch, step)).grad_norm for step in range(2)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("mesh", "parallel"),
    [(Mesh(tp=4), {}), (Mesh(pp=2, tp=2), {}), (Mesh(dp=2, pp=2), {}), (Mesh(dp=2, tp=2), {"zero": False})],
    ids=["tp4", "pp2-tp2", "dp2-pp2", "dp2-tp2-no-zero"],
)
def test_every_rank_knows_the_global_norm(ranks, mesh, parallel, arch):
    """Replicas, tied ends and padding counted once."""
    chosen = config(parallel={**parallel, "pp": mesh.pp, "tp": mesh.tp})
    _, norms, _ = reference(arch, chosen, steps=2)
    for found in ranks.run(run_norms, mesh, arch, chosen):
        assert found == pytest.approx(norms, rel=1e-7)


def run_uneven(world: World, arch: str, chosen: TrainConfig) -> tuple[int, list[float]]:
    engine = make(arch, world, chosen)
    return engine.micro_batches, [engine.step(batches(engine, arch, step)).loss for step in range(3)]


@pytest.mark.parametrize(("micro", "counts"), [(1, [3, 3, 2]), (2, [2, 1, 1])])
def test_ranks_that_do_not_divide_the_batch_compute_the_same_steps(ranks, micro, counts):
    chosen = config(micro=micro)
    losses, _, _ = reference("tied", chosen, steps=3)
    answers = ranks.run(run_uneven, Mesh(dp=3), "tied", chosen)
    assert [count for count, _ in answers] == counts
    for _, found in answers:
        assert found == pytest.approx(losses, rel=1e-9)


# Half precision


def train(precision: str, steps: int = 40) -> tuple[list[float], TrainEngine]:
    """Losses on one batch, again and again."""
    engine = make(chosen=config(precision, micro=4, lr=3e-3))
    return [engine.step(batches(engine, "untied", 0)).loss for _ in range(steps)], engine


@pytest.mark.parametrize("precision", ["bf16", "bf16-amp"])
def test_half_precision_learns_as_fp32_does(precision):
    wanted, _ = train("fp32")
    losses, engine = train(precision)
    assert wanted[-1] < wanted[0] - 1.5
    assert losses == pytest.approx(wanted, abs=0.1)
    assert engine.grads.dtype == torch.float32
    assert engine.model.weights.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones():
    """With documents, whose mask is another graph, and without."""
    eager, compiled = make(chosen=config("fp32")), make(chosen=config("fp32", compile=True))
    for step in range(4):
        a, b = (engine.step(batches(engine, "untied", step)) for engine in (eager, compiled))
        assert (b.loss, b.grad_norm) == pytest.approx((a.loss, a.grad_norm), rel=1e-4)
    scale = eager.model.weights.abs().max()
    torch.testing.assert_close(compiled.model.weights / scale, eager.model.weights / scale, rtol=0, atol=1e-4)


def test_bf16_weights_are_their_masters_rounded_and_masters_keep_what_rounding_loses():
    engine = make(chosen=config("bf16", lr=1e-7))
    master, before = engine.optimizer["master"], engine.model.weights.clone()
    start = master.clone()
    for step in range(2):
        engine.step(batches(engine, "untied", step))
        assert torch.equal(engine.model.weights, master.bfloat16())
    assert (engine.model.weights != before).sum() < 0.01 * master.numel()  # updates too small for bf16 ...
    assert (master != start).sum() > 0.5 * master.numel()  # ... are not lost


def test_a_model_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"precision bf16 needs torch.bfloat16 weights, the model has torch.float32"):
        TrainEngine(build(ARCHS["untied"]), config("bf16"))


# What all ranks agree on


def run_training(world: World, arch: str, chosen: TrainConfig):
    engine = make(arch, world, chosen)
    results = [engine.step(batches(engine, arch, step)) for step in range(3)]
    held = {key: values.numpy().tobytes() for key, values in canonical(engine).items()}
    return held, results, engine.record


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("mesh", "precision"),
    [(Mesh(dp=4), "fp32"), (Mesh(dp=2, tp=2), "fp32"), (Mesh(tp=4), "fp32"), (Mesh(dp=2, pp=2), "fp32")],
    ids=["dp4", "dp2-tp2", "tp4", "dp2-pp2"],
)
def test_ranks_that_hold_the_same_hold_the_same_bits(ranks, mesh, precision, arch):
    """ZeRO's shards after gathering, norms and replicated heads over tp, and a tied embedding's two ends."""
    chosen = config(precision, parallel={"pp": mesh.pp, "tp": mesh.tp})
    bits: dict[tuple, set] = {}
    answers = ranks.run(run_training, mesh, arch, chosen)
    for held, results, record in answers:
        assert (results, record) == answers[0][1:]
        for key, values in held.items():
            bits.setdefault(key, set()).add(values)
    assert {key for key, versions in bits.items() if len(versions) > 1} == set()


# Evaluation


def run_evaluation(world: World, arch: str, chosen: TrainConfig):
    engine = make(arch, world, chosen)
    engine.step(batches(engine, arch, 0))
    before = [t.clone() for t in (engine.grads, engine.model.weights, *engine.optimizer.values())]
    record = engine.record
    total, tokens = engine.evaluate(batches(engine, arch, 1)).tolist()
    after = [engine.grads, engine.model.weights, *engine.optimizer.values()]
    assert all(map(torch.equal, before, after))
    assert engine.record == record
    return total / tokens, tokens, engine.step(batches(engine, arch, 1)).loss


@pytest.mark.parametrize(
    ("mesh", "parallel"),
    [
        (Mesh(tp=4), {}),
        (Mesh(pp=2, tp=2), {}),
        (Mesh(dp=2, pp=2), {"virtual_stages": 2}),
        (Mesh(pp=4), {"schedule": "zero-bubble"}),
    ],
    ids=["tp4", "pp2-tp2", "dp2-pp2-v2", "pp4-zero-bubble"],
)
def test_evaluation_is_the_loss_of_the_next_step_and_changes_nothing(ranks, mesh, parallel):
    chosen = config(parallel={**parallel, "pp": mesh.pp, "tp": mesh.tp})
    tokens = global_batch("tied", 1).loss_mask_BS.sum().item()
    for evaluated, counted, trained in ranks.run(run_evaluation, mesh, "tied", chosen):
        assert evaluated == pytest.approx(trained, rel=1e-12)
        assert counted == tokens


# The record, and what a step may touch


def test_the_record_survives_json():
    engine = make()
    for step in range(3):
        engine.step(batches(engine, "untied", step))
    saved = json.loads(json.dumps(engine.record))
    tokens = sum(int(global_batch("untied", step).loss_mask_BS.sum()) for step in range(3))
    assert (saved["step"], saved["consumed_samples"], saved["consumed_tokens"]) == (3, 3 * BATCH, tokens)
    other = make(seed=1)
    other.record = saved
    assert other.record == engine.record
    other.model.weights.copy_(engine.model.weights)
    for name, state in other.optimizer.items():
        state.copy_(engine.optimizer[name])
    results = [e.step(batches(e, "untied", 3)) for e in (engine, other)]
    assert results[0] == results[1]
    assert torch.equal(engine.model.weights, other.model.weights)


def test_barriers_run_before_anything_changes_and_not_for_a_skipped_step():
    engine, seen = make(chosen=config("bf16")), []

    def state() -> list[torch.Tensor]:
        return [t.clone() for t in (engine.model.weights, *engine.optimizer.values())]

    engine.add_barrier(lambda: seen.append(state()))
    before = state()
    engine.step(batches(engine, "untied", 0))
    assert len(seen) == 1
    assert all(map(torch.equal, seen[0], before))
    assert not torch.equal(engine.model.weights, before[0])
    engine.model.weights[0] = torch.nan
    assert engine.step(batches(engine, "untied", 1)).skipped
    assert len(seen) == 1


def test_phases_are_timed():
    engine = make()
    engine.step(batches(engine, "untied", 0))
    assert engine.phases_s.keys() == {"forward_backward", "vote", "update", "gather"}


# Skipped steps


def spoil_weight(values: torch.Tensor) -> Callable[[], object]:
    first = values[(0,) * values.dim()]
    kept = first.clone()
    first.fill_(torch.inf)
    return lambda: first.copy_(kept)


def spoil_gradient(param: torch.nn.Parameter) -> Callable[[], object]:
    return param.register_hook(lambda grad: grad * torch.nan).remove


def run_spoiled(world: World, arch: str, chosen: TrainConfig, where: int, tensor: str, kind: str):
    """One good step, one with a bad number planted on rank `where`, one good again."""
    engine = make(arch, world, chosen)
    engine.step(batches(engine, arch, 0))
    found = [(slot.param, p) for slot in engine.model.slots for p in slot.param.parts if p.name == tensor]
    undo: Callable[[], object] = int
    if world.rank == where:
        (param, part), *_ = found
        undo = spoil_weight(part.view(param.data)) if kind == "weight" else spoil_gradient(param)
    before = [t.clone() for t in (engine.model.weights, *engine.optimizer.values())]
    bad = engine.step(batches(engine, arch, 1))
    unchanged = all(map(torch.equal, before, [engine.model.weights, *engine.optimizer.values()]))
    undo()
    good = engine.step(batches(engine, arch, 2))
    return bad.skipped, bad.culprit, unchanged, good.skipped, engine.record


@pytest.mark.parametrize(
    ("mesh", "arch", "kind", "tensor", "rank"),
    [
        (Mesh(), "untied", "weight", "model.layers.1.mlp.gate_proj.weight", 0),
        (Mesh(), "tied", "gradient", "model.layers.2.self_attn.q_norm.weight", 0),
        (Mesh(tp=2), "untied", "weight", "model.layers.2.self_attn.o_proj.weight", 1),
        (Mesh(tp=2), "untied", "gradient", "model.layers.0.mlp.down_proj.weight", 1),
        (Mesh(pp=2, tp=2), "tied", "weight", "model.layers.3.mlp.down_proj.weight", 3),
        (Mesh(pp=2, tp=2), "tied", "gradient", "model.layers.1.mlp.down_proj.weight", 1),
        (Mesh(dp=2), "untied", "weight", "lm_head.weight", 1),
        (Mesh(dp=2), "untied", "gradient", "model.layers.1.mlp.down_proj.weight", 1),
        (Mesh(dp=2, tp=2), "tied", "gradient", "model.layers.2.mlp.down_proj.weight", 3),
        (Mesh(tp=4), "tied", "weight", "model.norm.weight", 2),  # two ranks hold only padding of the vocabulary
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_number_skips_the_step_and_its_place_is_named(ranks, mesh, arch, kind, tensor, rank):
    chosen = config(parallel={"pp": mesh.pp, "tp": mesh.tp}, guard=GuardConfig(recheck=False))
    for skipped, culprit, unchanged, recovered, record in ranks.run(
        run_spoiled, mesh, arch, chosen, rank, tensor, kind
    ):
        assert skipped == "non-finite"
        assert culprit == f"{kind} of {tensor} on rank {rank}"
        assert unchanged
        assert recovered is None
        assert (record["step"], record["updates"], record["skipped"], record["nan_steps"]) == (3, 2, 1, 1)
        assert (record["consecutive_skips"], record["consumed_samples"]) == (0, 3 * BATCH)


def run_bad_copy(world: World):
    """The gradient of a weight that both ranks hold goes bad on the one whose copy the norm does not count."""
    parallel = {"tp": world.mesh.tp, "sequence_parallel": False}
    engine = make("untied", world, config(parallel=parallel, guard=GuardConfig(recheck=False)))
    if world.rank == 1:
        spoil_gradient(engine.model.chunks[-1].norm.weight)
    result = engine.step(batches(engine, "untied", 0))
    return result.skipped, result.culprit


def test_a_bad_copy_of_what_another_rank_counts_is_seen_too(ranks):
    assert ranks.run(run_bad_copy, Mesh(tp=2)) == [("non-finite", "gradient of model.norm.weight on rank 1")] * 2


def run_without_zero(world: World, spoil_logits: bool):
    """A replica goes bad, and nothing of its gradients is left but the sum over dp."""
    chosen = config(parallel={"zero": False, "tp": world.mesh.tp}, guard=GuardConfig(recheck=False))
    engine = make("untied", world, chosen)
    chunk = engine.model.chunks[-1]
    if world.coords.dp and spoil_logits:
        chunk.head.register_forward_hook(lambda module, given, logits: logits * torch.nan)
    elif world.coords.dp:
        spoil_gradient(chunk.norm.weight)
    return engine.step(batches(engine, "untied", 0)).culprit


def test_without_zero_a_bad_loss_tells_the_replica_and_else_all_are_named(ranks):
    unknown = "gradient of model.norm.weight on rank 0 or its data-parallel peer 1"
    assert ranks.run(run_without_zero, Mesh(dp=2), False) == [unknown] * 2
    assert ranks.run(run_without_zero, Mesh(dp=2, tp=2), True) == ["gradient of lm_head.weight on rank 2"] * 4


def test_a_skipped_step_leaves_no_trace_in_the_ones_that_follow():
    skipping, other = make(), make()
    for engine in (skipping, other):
        engine.step(batches(engine, "untied", 0))
    undo = spoil_gradient(skipping.model.slots[3].param)
    assert skipping.step(batches(skipping, "untied", 1)).skipped
    undo()
    for engine in (skipping, other):
        engine.step(batches(engine, "untied", 2))
    assert torch.equal(skipping.model.weights, other.model.weights)


def test_the_gradient_nearest_the_loss_is_named():
    """Of two, and of all that follow: what is upstream is only infected."""
    engine = make(arch="tied", chosen=config())
    names = {part.name: slot.param for slot in engine.model.slots for part in slot.param.parts}
    for layer in (0, 2):
        names[f"model.layers.{layer}.mlp.down_proj.weight"].register_hook(lambda grad: grad * torch.inf)
    culprit = engine.step(batches(engine, "tied", 0)).culprit
    assert culprit == "gradient of model.layers.2.mlp.down_proj.weight on rank 0"


def test_training_stops_after_too_many_skipped_steps_and_says_why():
    engine = make(chosen=config(guard=GuardConfig(max_consecutive_skips=2)))
    engine.model.slots[0].param.data[0] = torch.nan
    name = engine.model.slots[0].param.parts[0].name
    assert engine.step(batches(engine, "untied", 0)).skipped == "non-finite"
    with pytest.raises(
        TrainingStopped, match=rf"2 steps in a row .* step 2; first bad value: weight of {name} on rank 0"
    ):
        engine.step(batches(engine, "untied", 1))
    assert engine.counters.step == 2


def test_a_spike_skips_the_step_and_is_forgotten():
    engine = make(chosen=config(guard=GuardConfig(spike_factor=3.0)))
    norms = [engine.step(batches(engine, "untied", step)).grad_norm for step in range(20)]
    before, mean = engine.model.weights.clone(), engine.counters.norm_mean
    assert min(norms) < mean < max(norms)
    engine.record = engine.record | {"norm_mean": mean / 100}
    result = engine.step(batches(engine, "untied", 20))
    assert (result.skipped, result.culprit) == ("spike", None)
    assert torch.equal(engine.model.weights, before)
    assert (engine.counters.skipped, engine.counters.nan_steps, engine.counters.norm_mean) == (1, 0, mean / 100)
    engine.record = engine.record | {"norm_mean": mean}
    assert engine.step(batches(engine, "untied", 21)).skipped is None


# Bad input


def cut(batch: MicroBatch, length: int) -> MicroBatch:
    return batch.map(lambda tensor: tensor[:, :length])


def run_refusal(world: World, chosen: TrainConfig, length: int) -> str:
    engine = make("untied", world, chosen)
    with pytest.raises(ValueError) as caught:
        engine.step([cut(batch, length) for batch in batches(engine, "untied", 0)])
    return str(caught.value)


def test_what_cannot_be_split_is_refused(ranks):
    for message in ranks.run(run_refusal, Mesh(tp=2), config(micro=1, parallel={"tp": 2}), LENGTH - 1):
        assert "sequence_length = 11 tokens are not divisible by parallel.tp 2; change" in message
    engine = make()
    with pytest.raises(ValueError, match=r"got 3 micro-batches, this rank runs 4"):
        engine.step(batches(engine, "untied", 0)[:3])
    with pytest.raises(ValueError, match=r"global_batch_size 8 is not divisible by dp x micro_batch_size = 1 x 3"):
        make(chosen=config(micro=3))
    with pytest.raises(ValueError, match=r"3 layers cannot fill .* = 1 x 4"):
        make(chosen=config(parallel={"virtual_stages": 4}))


def test_a_batch_without_a_token_that_counts_is_refused():
    engine = make()
    full = batches(engine, "untied", 0)
    empty = [MicroBatch(b.tokens_BS, b.labels_BS, torch.zeros_like(b.loss_mask_BS)) for b in full]
    with pytest.raises(ValueError, match="no token of the global batch counts"):
        engine.step(empty)


def test_unknown_parallel_options_never_reach_the_engine():
    with pytest.raises(ValueError, match=r"schedule is 'dual'; expected one of 'gpipe', '1f1b'"):
        ParallelConfig(schedule="dual")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_that_sleeps_between_its_steps_has_the_bits_of_one_that_does_not(device, precision):
    engines = [make(world=World.single(device), chosen=config(precision)) for _ in range(2)]
    for step in range(4):
        steady, napping = (engine.step(batches(engine, "untied", step)) for engine in engines)
        assert steady == napping
        engines[1].sleep()
        assert engines[1].grads.untyped_storage().nbytes() == 0
        assert {tensor.device.type for tensor in engines[1].optimizer.values()} == {"cpu"}
        with pytest.raises(AssertionError, match="asleep"):
            engines[1].forward_backward(batches(engines[1], "untied", step))
        for name, tensor in engines[0].optimizer.items():  # a save finds them here
            assert torch.equal(tensor.cpu(), engines[1].optimizer[name])
        engines[1].wake()
        engines[1].wake()
    assert torch.equal(*(engine.model.weights for engine in engines))


def test_a_rank_that_is_told_to_give_up_does_not_finish_its_backward():
    engine = make()
    first, last = engine.model.slots[0], engine.model.slots[-1]
    last.param.register_post_accumulate_grad_hook(lambda _: engine.world.give_up("a peer is lost"))
    with pytest.raises(GaveUp, match="a peer is lost"):
        engine.step(batches(engine, "untied", 0))
    assert engine.standing().phase == "forward_backward"
    assert not engine.grads[first.offset : first.offset + first.numel].any()
