"""Reinforcing adapters: the reference is the model without them, and engines are sent nothing else."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raytron import rl
from raytron.actors import Session
from raytron.config import EngineConfig, LoRAConfig
from raytron.models import build, from_pretrained, resolve
from raytron.parallel.collectives import World
from raytron.rl.task import CriticTask, PolicyTask
from recipes.grpo import config as recipe
from tests.rl import test_task
from tests.rl.test_driver import config as run_config
from tests.rl.test_driver import steps
from tests.rl.test_task import batch_of, joined

LORA = LoRAConfig(rank=4, alpha=8)
ARCH = replace(test_task.ARCH, lora=LORA)


def test_the_reference_is_the_model_without_its_adapters(tmp_path: Path):
    algorithm = {"kl": "loss", "kl_coefficient": 0.1}
    chosen = test_task.config(tmp_path, precision="fp32", algorithm=algorithm, reproducible=True)
    task, batch = PolicyTask(World.single(), chosen, ARCH, str(tmp_path / "c")), batch_of()
    assert task.reference is None
    start = task.score(batch)
    kl = []
    for _ in range(2):
        reference = task.score(batch, True)
        assert np.array_equal(reference[1], start[1])
        prepared = task.algorithm.prepare(batch.having(**joined(batch, reference=reference)))
        kl.append(task.train(prepared)["reference_kl"])
    assert kl[0] == 0 < kl[1]
    assert not np.array_equal(task.score(batch)[1], start[1])
    frozen = slice(0, task.model.frozen)
    assert torch.equal(task.model.weights[frozen], build(ARCH, seed=chosen.seed).weights[frozen])


def test_a_critic_trains_its_head_beside_its_adapters(tmp_path: Path):
    chosen = test_task.config(tmp_path, "ppo", precision="fp32")
    task, batch = CriticTask(World.single(), chosen, ARCH, str(tmp_path / "critic")), batch_of()
    frozen = task.model.weights[: task.model.frozen].clone()
    prepared = task.algorithm.prepare(batch.having(values=np.zeros(len(batch.tokens))))
    errors = [task.train(prepared)["value_error"] for _ in range(30)]
    assert errors[-1] < 0.9 * errors[0]
    assert torch.equal(frozen, task.model.weights[: task.model.frozen])
    assert task.save(wait=True) is None
    again = CriticTask(World.single(), chosen, ARCH, str(tmp_path / "critic"))
    assert again.load() == (30, [])
    assert torch.equal(again.model.weights, task.model.weights)


@pytest.mark.slow
def test_a_run_of_adapters_learns_and_agrees_with_its_engines_to_the_bit(cluster: Session, tmp_path: Path):
    """From a policy that is half there; resumed in between, at the same bits."""
    before = rl.run(run_config(tmp_path, "before", 6))
    path = f"{before.checkpoint.path}/model"
    model = replace(recipe.model, path=path, overrides={}, lora=LoRAConfig(rank=8, alpha=32))
    algorithm = replace(recipe.algorithm, kl="loss", kl_coefficient=0.001)
    more = {"model": model, "algorithm": algorithm, "reproducible": True}
    result = rl.run(run_config(tmp_path, "adapters", 20, **more))
    records = [r["extra"] for r in steps(tmp_path / "adapters")]
    assert [r["policy/bit_equal"] for r in records] == [1.0] * 20
    assert records[0]["policy/reference_kl"] == 0 < records[-1]["policy/reference_kl"]
    assert result.metrics["eval/reward"] > before.metrics["eval/reward"]
    adapters = build(resolve(model), device="meta").trained_layout().tensors.values()
    assert {r["rollout/sync_bytes"] for r in records} == {sum(spec.nbytes for spec in adapters)}
    merged, base = (from_pretrained(folder).weights for folder in (f"{result.checkpoint.path}/model", path))
    assert 0 < (merged - base).abs().max() < 1
    rl.run(run_config(tmp_path, "cut", 8, 8, **more))
    rl.run(run_config(tmp_path, "cut", 20, 8, **more))
    rewards = [[r["extra"]["rollout/reward_mean"] for r in steps(tmp_path / name)] for name in ("cut", "adapters")]
    assert rewards[0] == rewards[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_is_given_merged_weights(cluster: Session, tmp_path: Path):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}  # of a size that vLLM knows
    model = replace(recipe.model, overrides=recipe.model.overrides | heads, lora=LoRAConfig(rank=8, alpha=64))
    engine = EngineConfig(engine="vllm", max_num_seqs=64, kv_cache_mb=64, threads=1)
    algorithm = replace(recipe.algorithm, kl="loss", kl_coefficient=0.001)
    more = {"model": model, "algorithm": algorithm, "rollout": replace(recipe.rollout, engine=engine), "prompts": 8}
    optimizer = replace(recipe.optimizer, lr=1e-2)
    result = rl.run(run_config(tmp_path, "vllm", 3, optimizer=optimizer, **more))
    records = [r["extra"] for r in steps(tmp_path / "vllm")]
    assert max(r["policy/mismatch"] for r in records) < 1e-4
    assert records[-1]["policy/reference_kl"] > 1e-3  # weights without the adapters would show as mismatch
    merged = from_pretrained(f"{result.checkpoint.path}/model")
    whole = sum(spec.nbytes for spec in merged.layout().tensors.values())
    assert {r["rollout/sync_bytes"] for r in records} == {whole}
