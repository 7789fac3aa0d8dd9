"""The driver: what it refuses before anything starts, and one small run from end to end."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess

import pytest

from raytron import pretrain
from raytron.actors import CapacityError
from raytron.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    ScalingConfig,
    from_dict,
)
from raytron.metrics import EvalRecord, StepRecord, read_records
from raytron.parallel import Mesh

pytestmark = pytest.mark.usefixtures("ray_of_this_module")
TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def run_config(tmp_path, interval: int = 3) -> RunConfig:
    saving = CheckpointConfig(interval=interval)
    return RunConfig(name="tiny", storage_path=str(tmp_path), checkpoint_config=saving)


@pytest.fixture(scope="module")
def ray_of_this_module():
    """Runs join the Ray they find: one for them all."""
    from raytron.actors import Session

    with Session(slots=2):
        yield


def tiny(tmp_path, **changes) -> PretrainConfig:
    config = PretrainConfig(
        model=ModelConfig(preset="llama-3m", overrides=TINY),
        data=DataConfig(mock=True, tokenizer="null:127", sequence_length=32),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4),
        global_batch_size=8,
        steps=6,
        evaluation=EvalConfig(batches=2),
        run=run_config(tmp_path),
    )
    return dataclasses.replace(config, **changes)


def test_a_run_leaves_everything_its_user_needs(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from raytron.models import from_pretrained

    config = tiny(tmp_path, parallel=ParallelConfig(tp=2), scaling=ScalingConfig(num_workers=2))
    result = pretrain.run(config)
    folder = tmp_path / "tiny"
    records = read_records(folder / "metrics.jsonl")
    assert [r.step for r in records if isinstance(r, StepRecord)] == [1, 2, 3, 4, 5, 6]
    assert sum(isinstance(r, EvalRecord) for r in records) == 1
    assert result.metrics["step"] == 6
    assert result.metrics["eval_loss"] < records[0].loss
    assert from_dict(PretrainConfig, json.loads((folder / "config.json").read_text())) == config
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "checkpoints" / "latest").exists()
    directory = f"{result.checkpoint.path}/model"
    theirs, ours = AutoModelForCausalLM.from_pretrained(directory), from_pretrained(directory)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(directory) is not None


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, capsys):
    config = tiny(tmp_path)
    pretrain.run(config)
    file = tmp_path / "tiny/checkpoints/step_00000006/model/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    pretrain.run(dataclasses.replace(config, steps=7))
    said = capsys.readouterr().out
    assert f"passed over a damaged checkpoint: {file}: its bytes are not those that were written" in said
    assert "continuing from step 3" in said
    records = read_records(tmp_path / "tiny/metrics.jsonl")
    assert [r.step for r in records if isinstance(r, StepRecord)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_reported_and_the_run_goes_on(tmp_path, capsys):
    disk = tmp_path / "tiny/checkpoints"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        result = pretrain.run(tiny(tmp_path, run=run_config(tmp_path, interval=2)))
        assert result.checkpoint.path == str(disk / "step_00000002")
    finally:
        subprocess.run(["umount", disk], check=True)
    said = capsys.readouterr().out
    for step in (4, 6):
        assert f"checkpoint step_0000000{step} was not saved: {disk}/" in said
    assert said.count("No space left on device") == 2
    assert result.metrics["step"] == 6


def refused(config: PretrainConfig, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        pretrain.run(config)
    for word in words:
        assert word in str(caught.value)


def test_bad_models_and_layouts_are_refused_before_anything_starts(tmp_path):
    def model(**overrides):
        return ModelConfig(preset="llama-3m", overrides=TINY | overrides)

    refused(tiny(tmp_path, model=ModelConfig(preset="llama-4")), ValueError, "model.preset", "llama3-8b")
    refused(tiny(tmp_path, model=model(hidden=3)), ValueError, "model.overrides", "hidden_size")
    refused(
        tiny(tmp_path, model=model(num_key_value_heads=3)), ValueError, "num_key_value_heads", "num_attention_heads"
    )
    three = {"parallel": ParallelConfig(tp=3), "scaling": ScalingConfig(num_workers=3)}
    refused(tiny(tmp_path, **three), ValueError, "num_attention_heads 4", "parallel.tp 3")
    deep = {"parallel": ParallelConfig(pp=8), "scaling": ScalingConfig(num_workers=8)}
    refused(tiny(tmp_path, **deep), ValueError, "stage would hold no layer")
    long = DataConfig(mock=True, tokenizer="null:127", sequence_length=4096)
    refused(tiny(tmp_path, data=long), ValueError, "data.sequence_length 4096", "max_position_embeddings")
    refused(tiny(tmp_path, data=DataConfig(mock=True, tokenizer="null:5000")), ValueError, "5001", "vocab_size is 128")
    assert not (tmp_path / "tiny" / "checkpoints").exists()


def test_batches_must_divide_over_the_ranks(tmp_path):
    with pytest.raises(ValueError, match="global_batch_size 8 is not divisible by dp x micro_batch_size = 3 x 1"):
        tiny(tmp_path, scaling=ScalingConfig(num_workers=3))
    with pytest.raises(ValueError, match=r"scaling.num_workers 3 is not divisible by parallel tp x pp = 2 x 1"):
        tiny(tmp_path, scaling=ScalingConfig(num_workers=3), parallel=ParallelConfig(tp=2))


def test_a_run_that_cannot_fit_is_refused_with_the_numbers(tmp_path):
    big = ModelConfig(preset="llama3-70b", overrides={"vocab_size": 128})
    refused(tiny(tmp_path, model=big), CapacityError, "GiB", "offer", "weights", "micro_batch_size")


def test_bad_data_is_refused(tmp_path):
    bytes_model = ModelConfig(preset="llama-3m", overrides=TINY | {"vocab_size": 257})

    def reading(name, text=None):
        if text is not None:
            (tmp_path / name).write_text(text)
        return tiny(tmp_path, model=bytes_model, data=DataConfig(path=str(tmp_path / name), sequence_length=32))

    refused(reading("empty.txt", ""), ValueError, "empty.txt")
    refused(reading("bad.jsonl", '{"text": "a"}\n{"text": \n'), ValueError, "bad.jsonl", "2")
    refused(reading("no.txt"), ValueError, "no.txt")
    refused(tiny(tmp_path, model=bytes_model, data=DataConfig()), ValueError, "data.path")


def test_ray_trains_own_types_are_taken_and_a_finished_run_is_not_overwritten(tmp_path):
    import ray.train

    config = tiny(tmp_path, steps=2)
    theirs = ray.train.RunConfig(name="theirs", storage_path=str(tmp_path))
    result = pretrain.run(config, run_config=theirs, scaling_config=ray.train.ScalingConfig(num_workers=1))
    assert isinstance(result, ray.train.Result)
    assert result.path == str(tmp_path / "theirs")
    again = dataclasses.replace(config, run=RunConfig(name="theirs", storage_path=str(tmp_path)), resume=False)
    refused(again, ValueError, "already has checkpoints", "resume")


def test_a_run_takes_as_many_ranks_as_the_cluster_has_room_for(tmp_path):
    from raytron.actors.placement import Node

    def nodes(*free):
        return [Node(str(i), str(i), {"CPU": 64.0}, {"CPU": float(n)}) for i, n in enumerate(free)]

    config = tiny(tmp_path, parallel=ParallelConfig(tp=2), scaling=ScalingConfig(num_workers=(2, 8)))
    assert pretrain.fitting_dp(config, nodes(64)) == 4
    assert pretrain.fitting_dp(config, nodes(3, 2)) == 2
    assert pretrain.fitting_dp(config, nodes(7)) == 3  # which may have 3, 3 and 2 of a global batch of 8
    assert pretrain.fitting_dp(config, nodes(1)) == 4  # placing it says what is missing


def test_a_run_that_goes_on_takes_the_shape_that_finds_seats(tmp_path):
    from raytron.actors.placement import Node

    def nodes(*free):
        return [Node(str(i), str(i), {"CPU": 64.0}, {"CPU": float(n)}) for i, n in enumerate(free)]

    config = tiny(tmp_path, parallel=ParallelConfig(tp=2, pp=2), scaling=ScalingConfig(num_workers=(4, 8)))
    arch = pretrain.Run(config).arch
    assert pretrain.fitting_mesh(config, arch, nodes(5)) == Mesh(dp=1, pp=2, tp=2)
    assert pretrain.fitting_mesh(config, arch, nodes(3, 1)) == Mesh(dp=2, pp=2)  # one node has no room for two of tp 2
    assert pretrain.fitting_mesh(config, arch, nodes(1)).size == 4  # the fewest: it begins with the first that come
