"""The trainer's side: any cut of a batch gives one gradient, scores are the engine's, and weights come and go whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from raytron.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, ScheduleConfig
from raytron.models.arch import DecoderConfig
from raytron.parallel.mesh import Mesh
from raytron.rl.config import AlgorithmConfig, RLConfig, RolloutConfig
from raytron.rl.task import CriticTask, PolicyTask
from raytron.rl.types import Batch, Group, Trajectory
from tests.training.engines import canonical

ARCH = DecoderConfig(
    vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip


def config(tmp_path, name: str = "grpo", precision: str = "fp64", **more) -> RLConfig:
    algorithm = AlgorithmConfig(name=name, **more.pop("algorithm", {}))
    return RLConfig(
        model=ModelConfig(), algorithm=algorithm, precision=precision, steps=10,
        parallel=ParallelConfig(zero=False, **more.pop("parallel", {})),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3), schedule=ScheduleConfig(kind="constant"),
        run=RunConfig(name="r", storage_path=str(tmp_path)), **more,
    )  # fmt: skip


def batch_of(seed: int = 0) -> Batch:
    """Four groups of three, of many lengths, with masked stretches inside and off-policy log-probabilities."""
    random = np.random.default_rng(seed)

    def trajectory(prompt: np.ndarray) -> Trajectory:
        length = len(prompt) + int(random.integers(2, 12))
        tokens = np.concatenate((prompt, random.integers(0, 23, length - len(prompt))))
        chosen = random.random(length) < 0.7
        chosen[: len(prompt)], chosen[-1] = False, True
        logprobs = np.where(chosen, random.normal(-3, 0.5, length), 0)
        return Trajectory(tokens, chosen, logprobs, np.where(chosen, 0, -1), float(random.normal()))

    prompts = [random.integers(0, 23, n) for n in (2, 1, 6, 3)]
    return Batch.of([Group(g, tuple(trajectory(prompt) for _ in range(3))) for g, prompt in enumerate(prompts)])


def gradients(world, chosen: RLConfig, folder: str, batch: Batch):
    task = PolicyTask(world, chosen, ARCH, folder)
    counts = task.engine.forward_backward(task._micro_batches(task.algorithm.prepare(batch)))
    vote = task.engine.vote(counts)
    return canonical(task.engine, task.engine.grads), vote.loss, vote.tokens, dict(vote.sums)


CUTS = [
    (Mesh(), {"micro_batch_tokens": 12}),
    (Mesh(), {"micro_batch_tokens": 30}),
    (Mesh(), {"packing": True, "micro_batch_tokens": 40}),
    (Mesh(), {"packing": True, "share_prompts": False, "micro_batch_tokens": 40}),
    (Mesh(dp=2), {"micro_batch_tokens": 30}),
    (Mesh(dp=4), {"packing": True, "micro_batch_tokens": 20}),
    (Mesh(tp=2, dp=2), {"parallel": {"tp": 2}}),
    (Mesh(pp=2), {"parallel": {"pp": 2}, "micro_batch_tokens": 30}),
    (Mesh(pp=2, dp=2), {"parallel": {"pp": 2, "virtual_stages": 1, "schedule": "zero-bubble"}, "packing": True}),
]
ALGORITHMS = [
    ("grpo", {}),
    ("grpo", {"reduction": "token", "entropy_coefficient": 0.1}),
    ("gspo", {}),
]


@pytest.mark.parametrize(("name", "options"), ALGORITHMS, ids=["grpo", "token", "gspo"])
def test_every_cut_gives_the_same_gradient(ranks, tmp_path, name, options):
    batch = batch_of()
    ((wanted, loss, tokens, sums),) = ranks.run(
        gradients, Mesh(), config(tmp_path, name, algorithm=options), str(tmp_path / "c"), batch
    )
    whole = {tensor: value for (tensor, _), value in wanted.items()}
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-3
    for mesh, more in CUTS:
        chosen = config(
            tmp_path, name, algorithm=options, **{k: dict(v) if k == "parallel" else v for k, v in more.items()}
        )
        for found, its_loss, its_tokens, its_sums in ranks.run(gradients, mesh, chosen, str(tmp_path / "c"), batch):
            assert its_tokens == tokens
            assert its_loss == pytest.approx(loss, rel=1e-9)
            assert its_sums == pytest.approx(sums, rel=1e-6, abs=1e-9)
            for (tensor, box), value in found.items():
                part = whole[tensor][tuple(slice(a, b) for a, b in box)]
                torch.testing.assert_close(value, part, rtol=1e-6, atol=1e-9, msg=lambda m, t=tensor: f"{t}: {m}")


def scores(world, chosen: RLConfig, folder: str, batch: Batch, steps: int):
    """Scores of the current and of the reference's weights, after some steps."""
    task = PolicyTask(world, chosen, ARCH, folder)
    before = task.score(batch)
    for _ in range(steps):
        reference = task.score(batch, True)
        task.train(task.algorithm.prepare(batch.having(**joined(batch, reference=reference))))
    return before, task.score(batch), task.score(batch, True), task.version


def joined(batch: Batch, **found) -> dict[str, np.ndarray]:
    out = {}
    for name, (index, values) in found.items():
        out[name] = np.zeros(len(batch.tokens), np.float32)
        out[name][index] = values
    return out


def test_the_reference_stays_what_the_run_began_with(tmp_path):
    from raytron.parallel.collectives import World

    chosen = config(tmp_path, algorithm={"kl": "loss", "kl_coefficient": 0.1}, micro_batch_tokens=30)
    before, after, reference, version = scores(World.single(), chosen, str(tmp_path), batch_of(), 2)
    assert version == 2
    assert np.array_equal(before[0], reference[0])
    assert np.array_equal(before[1], reference[1])
    assert not np.allclose(before[1], after[1])


def test_scores_of_a_sharded_policy_are_those_of_the_whole(ranks, tmp_path):
    batch, chosen = batch_of(), config(tmp_path, micro_batch_tokens=30)
    wanted = joined(batch, s=ranks.run(scores, Mesh(), chosen, str(tmp_path), batch, 0)[0][0])["s"]
    for mesh, parallel in ((Mesh(dp=2, pp=2), {"pp": 2}), (Mesh(tp=2, dp=2), {"tp": 2})):
        cut = config(tmp_path, micro_batch_tokens=30, parallel=parallel)
        answers = [answer[0] for answer in ranks.run(scores, mesh, cut, str(tmp_path), batch, 0)]
        told = [answer for answer in answers if answer is not None]
        assert len(told) == mesh.dp
        index = np.concatenate([i for i, _ in told])
        assert len(set(index)) == len(index) == len(batch.tokens) - len(batch)
        found = sum(joined(batch, s=part)["s"] for part in told)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_several_updates_of_a_batch_are_one_version(tmp_path):
    from raytron.parallel.collectives import World

    chosen = config(tmp_path, algorithm={"minibatches": 2, "epochs": 2})
    task = PolicyTask(World.single(), chosen, ARCH, str(tmp_path))
    metrics = task.train(task.algorithm.prepare(batch_of()))
    assert task.version == 1
    assert task.engine.counters.step == 4
    assert metrics["consumed_samples"] == 24
    task.save(wait=True)
    again = PolicyTask(World.single(), chosen, ARCH, str(tmp_path))
    assert again.load() == (1, [])
    assert torch.equal(again.model.weights, task.model.weights)


def test_a_critic_learns_the_returns(tmp_path):
    from raytron.parallel.collectives import World

    chosen = replace(config(tmp_path, "ppo", precision="fp32"), rollout=RolloutConfig())
    task, batch = CriticTask(World.single(), chosen, ARCH, str(tmp_path / "critic")), batch_of()
    _, values = task.score(batch)
    assert not values.any()
    prepared = task.algorithm.prepare(batch.having(values=np.zeros(len(batch.tokens))))
    errors = [task.train(prepared)["value_error"] for _ in range(30)]
    assert errors[-1] < 0.7 * errors[0]
