"""The driver of fine-tuning: whole runs, what they leave and say, and a model that RL starts from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from raytron import sft
from raytron.actors import Session
from raytron.config import (
    CheckpointConfig,
    EvalConfig,
    LoggingConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScalingConfig,
    ScheduleConfig,
    SFTConfig,
    SFTDataConfig,
    from_dict,
)
from raytron.data import write_word_problems
from raytron.metrics import EvalRecord, StepRecord, read_records

TINY = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def config(tmp_path: Path, name: str = "tiny", **changes) -> SFTConfig:
    made = SFTConfig(
        model=ModelConfig(preset="llama-3m", overrides=TINY | {"num_key_value_heads": 2}),
        data=SFTDataConfig(path=str(tmp_path / "problems.jsonl"), held_out=8, sequence_length=192),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4),
        schedule=ScheduleConfig(warmup_steps=2),
        micro_batch_size=4,
        logging=LoggingConfig(tensorboard=False),
        run=RunConfig(name=name, storage_path=str(tmp_path)),
    )
    if not Path(made.data.path).exists():
        write_word_problems(made.data.path, 80)
    return dataclasses.replace(made, **changes)


def losses(folder: Path) -> list[float]:
    return [record.loss for record in read_records(folder / "metrics.jsonl") if isinstance(record, StepRecord)]


def test_a_run_leaves_a_model_with_its_tokenizer_and_says_what_it_learnt(cluster: Session, tmp_path, capsys):
    from transformers import AutoTokenizer

    from raytron.models import read_arch

    start = config(tmp_path)
    problems = tmp_path / "problems.jsonl"
    problems.write_text(problems.read_text() + json.dumps({"question": "?" * 300, "answer": "!"}) + "\n")
    start = dataclasses.replace(start, data=dataclasses.replace(start.data, overlong="drop"))
    result = sft.run(start)
    said = capsys.readouterr().out
    assert "training examples longer than data.sequence_length: 1 left out" in said
    assert "held-out prompts, and what the model answers" in said
    assert said.count("wanted: ") == 3
    records = read_records(tmp_path / "tiny/metrics.jsonl")
    steps = [record.step for record in records if isinstance(record, StepRecord)]
    written = from_dict(SFTConfig, json.loads((tmp_path / "tiny/config.json").read_text()))
    assert written == dataclasses.replace(start, steps=len(steps))
    assert steps == list(range(1, written.steps + 1))
    assert [record.loss for record in records if isinstance(record, EvalRecord)] == [result.metrics["eval_loss"]]
    assert result.metrics["eval_loss"] < losses(tmp_path / "tiny")[0]
    directory = f"{result.checkpoint.path}/model"
    assert AutoTokenizer.from_pretrained(directory).encode("a") == [97]
    assert (read_arch(directory).vocab_size, read_arch(directory).eos_token_id) == (257, 256)


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path):
    def refused(made: SFTConfig, *words: str) -> None:
        with pytest.raises(ValueError) as caught:
            sft.run(made)
        assert all(word in str(caught.value) for word in words), caught.value

    good = config(tmp_path)

    def data(**changes) -> SFTConfig:
        return dataclasses.replace(good, data=dataclasses.replace(good.data, **changes))

    refused(data(path=None), "data.path is not set")
    refused(data(path=str(tmp_path / "none.jsonl")), "none.jsonl isn't there")
    refused(data(sequence_length=20), "problems.jsonl:", "data.overlong")
    refused(data(sequence_length=4096), "data.sequence_length 4096", "max_position_embeddings")
    refused(data(tokenizer="bpe:300"), "has to be trained first")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    refused(data(path=str(tmp_path / "bad.jsonl"), held_out=0), "bad.jsonl:2", "response")
    assert not (tmp_path / "tiny" / "checkpoints").exists()


@pytest.mark.slow
def test_a_resumed_run_is_the_run_to_the_bit(cluster: Session, tmp_path):
    saving = CheckpointConfig(interval=5)
    runs = [
        config(tmp_path, name, epochs=3, answers=0, run=RunConfig(name, str(tmp_path), checkpoint_config=saving))
        for name in ("whole", "cut")
    ]
    whole = sft.run(runs[0])
    cut = dataclasses.replace(
        runs[1], schedule=dataclasses.replace(runs[1].schedule, decay_steps=whole.metrics["step"])
    )
    sft.run(dataclasses.replace(cut, steps=5))
    sft.run(cut)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copy", "calculator"])
def test_rl_starts_far_ahead_from_a_model_that_saw_demonstrations(cluster: Session, tmp_path, name):
    """The first step's mean reward, of a fresh model and of one fine-tuned on the task's own right answers."""
    from raytron import rl
    from raytron.rl.config import TaskConfig
    from raytron.rl.demonstrations import write_demonstrations
    from raytron.rl.tasks import build
    from recipes.grpo import config as recipe

    task = build(TaskConfig(name))
    path = write_demonstrations(task, tmp_path / "warm", 1500, first=10**6)
    start = SFTConfig(
        model=recipe.model,
        data=SFTDataConfig(path=str(path), tokenizer=str(tmp_path / "warm"), held_out=64, sequence_length=64),
        epochs=4,
        global_batch_size=8,
        micro_batch_size=8,
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, weight_decay=0.0),
        evaluation=EvalConfig(batches=4),
        logging=LoggingConfig(tensorboard=False),
        run=RunConfig(name="sft", storage_path=str(tmp_path)),
    )
    warm = sft.run(start)

    def first_reward(label: str, model: ModelConfig) -> float:
        made = dataclasses.replace(
            recipe,
            model=model,
            task=TaskConfig(name),
            steps=1,
            logging=LoggingConfig(tensorboard=False),
            evaluation=dataclasses.replace(recipe.evaluation, interval=0, prompts=1),
            run=RunConfig(name=label, storage_path=str(tmp_path)),
        )
        return rl.run(made).metrics["rollout/reward_mean"]

    fresh = first_reward("fresh", recipe.model)
    ahead = first_reward("warm", ModelConfig(path=f"{warm.checkpoint.path}/model"))
    assert fresh < 0.1
    assert ahead > 0.9


def test_rl_refuses_a_model_whose_tokenizer_is_another(tmp_path):
    from raytron import rl
    from raytron.checkpoint import save_pretrained
    from raytron.data import ByteTokenizer
    from raytron.models import PRESETS, build
    from recipes.grpo import config as recipe

    save_pretrained(build(PRESETS["llama-tiny"], seed=0), tmp_path / "model", tokenizer=ByteTokenizer())
    made = dataclasses.replace(
        recipe,
        model=ModelConfig(path=str(tmp_path / "model")),
        run=RunConfig(name="rl", storage_path=str(tmp_path)),
    )
    with pytest.raises(ValueError, match=r"is token \d+ of the task and .* give the task the model's own tokenizer"):
        rl.run(made)


@pytest.mark.slow
def test_adapters_are_tuned_and_go_on_at_another_layout(cluster: Session, tmp_path, capsys):
    import torch

    from raytron.models import begin, from_pretrained, resolve

    base = f"{sft.run(config(tmp_path, 'base', epochs=6)).checkpoint.path}/model"
    lora = LoRAConfig(rank=8, alpha=32)
    start = config(tmp_path, "adapters", model=ModelConfig(path=base, lora=lora), epochs=8)
    start = dataclasses.replace(
        start, optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3), evaluation=EvalConfig(batches=4)
    )
    first = sft.run(start)
    said = capsys.readouterr().out
    assert "adapters of rank 8" in said
    assert losses(tmp_path / "adapters")[-1] < losses(tmp_path / "adapters")[0] - 0.1
    more = dataclasses.replace(start, epochs=10, parallel=ParallelConfig(tp=2), scaling=ScalingConfig(num_workers=2))
    second = sft.run(more)
    assert second.metrics["eval_loss"] < first.metrics["eval_loss"]
    folder = second.checkpoint.path
    merged = from_pretrained(f"{folder}/model")
    again = dataclasses.replace(start.model, lora=LoRAConfig(path=f"{folder}/adapter"))
    beside = begin(again, resolve(again))
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), beside(tokens), rtol=0, atol=1e-4)
        assert (merged(tokens) - from_pretrained(base)(tokens)).abs().max() > 0.1
