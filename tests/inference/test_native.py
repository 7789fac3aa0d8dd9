"""What only the native engine promises: any layout, and in reproducible mode the bits of the trainer's forward."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raytron.config import EngineConfig
from raytron.inference import (
    LLM,
    Collector,
    NativeEngine,
    Output,
    Request,
    SamplingParams,
    WeightUpdateError,
    make_engine,
)
from raytron.models import build, from_pretrained, kernels
from raytron.models.arch import DecoderConfig
from raytron.parallel.shared import FILE, SharedDirectory
from tests.models.hugging_face import random_model

SIZES = {
    "model_type": "llama", "vocab_size": 211, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> tuple[Path, object]:
    """A Hugging Face directory, and the transformers model in it."""
    folder, model = tmp_path_factory.mktemp("model"), random_model(SIZES, seed=1)
    with torch.no_grad():  # as large as trained ones: larger logits would have larger rounding errors
        for param in model.parameters():
            param.mul_(0.4 if param.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    return folder, model.eval()


def prompts(count: int, longest: int = 90, seed: int = 0) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.randrange(211) for _ in range(chance.randrange(1, longest))) for _ in range(count)]


def teacher_forced(model, prompt, tokens) -> tuple[list[int], torch.Tensor]:
    """transformers' likeliest token before each of `tokens`, and the log-probability of each of them."""
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([[*prompt, *tokens]])).logits[0].double(), -1)
    logs = logs[len(prompt) - 1 : -1]
    return logs.argmax(-1).tolist(), logs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_greedy_tokens_equal_transformers_at_any_layout(directory, tp, pp):
    folder, theirs = directory
    asked = prompts(16)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    options = {"kv_cache_mb": 4, "max_batched_tokens": 64, "max_num_seqs": 8, "threads": 1}
    with LLM(folder, tp=tp, pp=pp, dtype="fp32", **options) as llm:
        found = llm.generate(asked, params)
        scored = llm.generate([[*asked[0], *found[0].outputs[0].token_ids]], SamplingParams(
            temperature=0.0, max_tokens=0, prompt_logprobs=1
        ))[0]  # fmt: skip
    for prompt, generation in zip(asked, found, strict=True):
        (output,) = generation.outputs
        likeliest, logprobs = teacher_forced(theirs, prompt, output.token_ids)
        assert output.token_ids == likeliest
        assert (torch.tensor(output.logprobs) - logprobs).abs().max() < 2e-5
        assert output.versions == [0] * 64
    assert scored.outputs[0].token_ids == []
    assert scored.prompt_logprobs[-64:] == pytest.approx(found[0].outputs[0].logprobs, abs=2e-5)


def run(engine: NativeEngine, requests: list[Request], late: int = 0) -> dict[str, tuple]:
    """Tokens and log-probabilities by request; the last `late` requests come when the others are under way."""
    collector = Collector()
    for request in requests[: len(requests) - late]:
        engine.add(request)
        collector.expect(request)
    for _ in range(5):
        for output in engine.step():
            collector.put(output)
    for request in requests[len(requests) - late :]:
        engine.add(request)
        collector.expect(request)
    while engine.has_unfinished():
        for output in engine.step():
            collector.put(output)
    made = {name: g.outputs[0] for name, g in collector.generations.items()}
    return {name: (tuple(o.token_ids), tuple(o.logprobs)) for name, o in made.items()}


def requests(seed: int = 0) -> list[Request]:
    """Two that begin alike, greedy and sampled ones, of many lengths."""
    asked = prompts(6, 70, seed)
    asked[3] = asked[2][:40] + asked[3]
    asked[2] = asked[2][:40] + asked[2]
    return [
        Request(str(i), prompt, SamplingParams(temperature=i % 2 * 0.8, seed=i, max_tokens=30, ignore_eos=True))
        for i, prompt in enumerate(asked)
    ]


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reproducible_mode_gives_the_trainers_bits_whatever_happens(directory, dtype):
    """Alone, together, in chunks, from the cache, after preemption, late: the same tokens, the same log-probabilities,
    and those of the trainer's forward over the finished sequence."""
    folder, _ = directory
    asked = requests()

    def engine(**options) -> NativeEngine:
        return NativeEngine(EngineConfig(path=str(folder), dtype=dtype, reproducible=True, **options))

    roomy = engine(kv_cache_mb=4)
    wanted = run(roomy, asked)
    assert run(roomy, asked) == wanted  # now from the cache
    assert roomy.stats().cached_tokens > 100
    assert run(engine(kv_cache_mb=4, max_batched_tokens=7, prefix_caching=False), asked) == wanted
    assert run(engine(kv_cache_mb=4, max_num_seqs=2, block_size=64), asked, late=3) == wanted
    tight = engine(kv_cache_mb=0.15 if dtype == "fp32" else 0.075, max_model_len=160)
    assert run(tight, asked) == wanted
    assert tight.stats().preemptions > 0
    for request in asked:
        assert run(engine(kv_cache_mb=4), [request]) == {request.id: wanted[request.id]}
    trainer = from_pretrained(folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    trainer.use_kernels(reproducible=True)
    for request in asked:
        tokens, logprobs = wanted[request.id]
        whole = torch.tensor([[*request.prompt_token_ids, *tokens]])
        logs = torch.log_softmax(trainer(whole)[0].float(), -1)[len(request.prompt_token_ids) - 1 : -1]
        assert logs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).tolist() == list(logprobs)


def test_sampled_tokens_do_not_depend_on_layout_or_company(directory):
    folder, _ = directory
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=20, n=2, ignore_eos=True)
    asked = prompts(3, 20, seed=4)
    found = []
    for tp, seqs in ((1, 1), (1, 8), (2, 4)):
        with LLM(folder, tp=tp, dtype="fp32", kv_cache_mb=4, max_num_seqs=seqs, threads=1) as llm:
            found.append([[o.token_ids for o in g.outputs] for g in llm.generate(asked, params)])
    assert found[0] == found[1] == found[2]
    assert found[0][0][0] != found[0][0][1]


def test_new_weights_reach_every_rank(directory):
    folder, _ = directory
    other = build(DecoderConfig(**{k: v for k, v in SIZES.items() if k not in ("model_type", "rope_parameters")},
                                rope_theta=1e4), seed=9)  # fmt: skip
    tensors = {
        piece_name: other.weights.as_strided([b - a for a, b in piece.box], piece.strides, piece.offset)
        for piece_name, piece in other.layout().at("rank-0")
    }
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    with LLM(folder, tp=2, pp=2, dtype="fp32", kv_cache_mb=4, threads=1) as llm:
        before = llm.generate([[1, 2, 3]], params)[0].outputs[0]
        llm.update_weights(tensors)
        after = llm.generate([[1, 2, 3]], params)[0].outputs[0]
        llm.update_weights(str(folder))
        again = llm.generate([[1, 2, 3]], params)[0].outputs[0]
    with torch.no_grad():
        logs = torch.log_softmax(other(torch.tensor([[1, 2, 3, *after.token_ids]]))[0, 2:-1], -1)
    assert after.token_ids == logs.argmax(-1).tolist()
    assert after.versions == [1] * 10
    assert (again.token_ids, again.logprobs) == (before.token_ids, before.logprobs)
    assert again.versions == [2] * 10


def test_a_rank_that_dies_is_an_error_and_not_a_wait(directory):
    folder, _ = directory
    llm = LLM(folder, tp=2, dtype="fp32", kv_cache_mb=4, threads=1)
    llm.engine._ranks._processes[0].kill()
    with pytest.raises(RuntimeError):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=200, ignore_eos=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 20}, "multiple of 32"),
        ({"max_model_len": 300}, "max_position_embeddings 256"),
        ({"kv_cache_mb": 0.05, "max_model_len": 200}, "kv_cache_mb"),
        ({"kv_cache_mb": 0.001}, "does not hold one block"),
        ({"tp": 3}, "tp"),
        ({"pp": 5}, "no layer"),
    ],
)
def test_an_engine_that_cannot_be_says_why(directory, options, message):
    folder, _ = directory
    with pytest.raises(ValueError, match=message):
        LLM(folder, dtype="fp32", **options)


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights", [False, True], ids=["cache", "weights"])
def test_an_engine_that_sleeps_has_given_its_memory_back_and_goes_on_where_it_was(directory, tp, weights):
    folder, _ = directory
    engine = make_engine(
        EngineConfig(path=str(folder), tp=tp, dtype="fp32", kv_cache_mb=4, threads=1, reproducible=True)
    )
    asked, step, steps = requests(), engine.step, []
    wanted = run(engine, asked)
    weighs = engine.model.weights.numel()

    def stepping() -> list[Output]:
        steps.append(None)
        if len(steps) == 8:
            assert engine.sleep(weights) == []
            assert engine.runner._caches == {}
            assert engine.model.weights.numel() == (0 if weights else weighs)
            assert step() == []
            with pytest.raises(RuntimeError, match="asleep"):
                engine.resume()
            if weights:
                with pytest.raises(ValueError, match="stale"):
                    engine.add(Request("late", (1,)))
                engine.wake()
                assert step() == []  # there is nothing to compute with
                engine.sleep(weights)
                engine.start_weight_update()
                engine.update_weights(str(folder))
                engine.finish_weight_update(0)
                assert step() == []
            engine.wake()
        return step()

    engine.step = stepping
    assert run(engine, asked) == wanted
    assert len(steps) > 8
    engine.close()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_all_weights_are_written_for_other_engines_to_load(directory, tmp_path, tp, pp):
    folder, _ = directory
    engine = make_engine(EngineConfig(path=str(folder), tp=tp, pp=pp, dtype="fp32", kv_cache_mb=4, threads=1))
    shared = SharedDirectory(engine.tensors, {}, tmp_path)
    engine.write_weights(shared.path)
    written, wanted = load_file(Path(shared.path, FILE)), load_file(folder / "model.safetensors")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    with pytest.raises(WeightUpdateError):
        engine.write_weights(str(tmp_path / "nothing"))
    engine.start_weight_update()
    engine.update_weights({"model.norm.weight": wanted["model.norm.weight"]})
    with pytest.raises(WeightUpdateError, match="not whole"):
        engine.write_weights(shared.path)
    shared.close()
    engine.close()


def test_weights_of_somebody_else_are_not_given_back(directory):
    folder, _ = directory
    engine = NativeEngine(EngineConfig(path=str(folder), kv_cache_mb=4), model=from_pretrained(folder))
    with pytest.raises(ValueError, match="somebody else's model"):
        engine.sleep(weights=True)
