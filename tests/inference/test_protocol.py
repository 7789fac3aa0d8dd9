"""What every engine promises, held on the native engine and on real vLLM, with `transformers` as the oracle.

One engine a kind serves the whole module: it is small enough to be cramped (four sequences at once, chunks of 64
tokens, a cache that does not hold four long sequences), so that batching, chunking and preemption happen all the time.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raytron.config import EngineConfig
from raytron.inference import (
    Collector,
    Completion,
    Engine,
    Generation,
    Output,
    Request,
    SamplingParams,
    Stats,
    WeightUpdateError,
)
from tests.inference.models import Reference, make_model, tokenizer
from tests.models.hugging_face import stored

KINDS = ("native", "vllm")
CONTEXT, SEQUENCES, CHUNK = 256, 4, 64
CLOSE = 2e-5  # between log-probabilities of two fp32 implementations
LONG = "The lazy dog does not mind a schöner Tag, and the quick brown fox jumps over 12345 dogs. " * 3
TEXTS = ("The", "The quick brown fox", '{"name": ', "日本語", "dog " * 11, LONG)

_ids = (f"request-{i}" for i in itertools.count())


def start(kind: str, config: EngineConfig) -> Engine:
    if kind == "native":
        from raytron.inference.engine import NativeEngine

        return NativeEngine(config)
    from raytron.inference.vllm import VLLMEngine

    return VLLMEngine(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two models of one shape and different weights."""
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, seed) for seed, name in enumerate(("old", "new"), start=1)}


@pytest.fixture(scope="module")
def old(models) -> Reference:
    return Reference(models["old"])


@pytest.fixture(scope="module")
def new(models) -> Reference:
    return Reference(models["new"])


@pytest.fixture(scope="module", params=KINDS)
def started(request, models) -> Iterator[Engine]:
    if request.param == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    engine = start(
        request.param,
        EngineConfig(
            path=str(models["old"]),
            engine=request.param,
            max_model_len=CONTEXT,
            max_num_seqs=SEQUENCES,
            max_batched_tokens=CHUNK,
            block_size=32,
            kv_cache_mb=0.7,  # 22 blocks of 32 tokens, where four sequences of 256 would want 32
            threads=1,
        ),
    )
    assert isinstance(engine, Engine)
    yield engine
    engine.close()
    engine.close()


@pytest.fixture
def engine(started, models) -> Iterator[Engine]:
    """The module's engine with the old weights and nothing to do, and the same again afterwards for the next test."""
    yield started
    started.abort(list(_issued))
    _issued.clear()
    if started.stats().paused:
        started.resume()
    if started.version or started.stats().health != "ready":
        update(started, str(models["old"]), 0)
    assert not started.has_unfinished()
    assert (started.stats().kv_usage, started.stats().health) == (0.0, "ready")


_issued: set[str] = set()


# ------------------------------------------------------------------------------------------------------ what is asked


def tokens(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text))


def ask(prompt: str | tuple[int, ...], *, client: str = "", **params: object) -> Request:
    """A request, greedy unless told otherwise."""
    ids = tokens(prompt) if isinstance(prompt, str) else prompt
    made = Request(next(_ids), ids, SamplingParams(**{"temperature": 0.0, **params}), client)
    _issued.add(made.id)
    return made


class Session:
    """Requests sent to an engine, and what has come of them so far."""

    def __init__(self, engine: Engine, *requests: Request) -> None:
        self.engine, self.collector, self.outputs = engine, Collector(), []
        for request in requests:
            self.add(request)

    def add(self, request: Request) -> None:
        self.engine.add(request)
        self.collector.expect(request)

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert len(output.token_ids) == len(output.logprobs) == len(output.versions)
            self.collector.put(output)
        self.outputs += outputs

    def step_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(10_000):
            if condition():
                return
            assert self.engine.has_unfinished(), "the engine is done, and what was waited for has not come"
            self.take(self.engine.step())
        raise AssertionError("10,000 steps, and what was waited for has not come")

    def finish(self) -> list[Generation]:
        self.step_until(lambda: not self.engine.has_unfinished())
        return list(self.collector.generations.values())

    def so_far(self, request: Request) -> list[int]:
        """Tokens of the request's first sequence."""
        return self.collector.generations[request.id].outputs[0].token_ids


def answer(engine: Engine, request: Request) -> Completion:
    return Session(engine, request).finish()[0].outputs[0]


def update(engine: Engine, weights: object, version: int) -> None:
    engine.start_weight_update()
    engine.update_weights(weights)
    engine.finish_weight_update(version)


@pytest.fixture(scope="module")
def letters() -> dict[int, float]:
    """A bias that makes every token one of plain letters, so that text is what the tokens say."""
    vocabulary = range(tokenizer().vocab_size)
    return {i: 60.0 for i in vocabulary if re.fullmatch("[a-zA-Z]+", tokenizer().decode([i]))}


# ------------------------------------------------------------------------------------------------------- what must be


def logprobs(logits_TV: Tensor, chosen: list[int] | tuple[int, ...]) -> list[float]:
    return logits_TV.log_softmax(-1)[torch.arange(len(chosen)), torch.tensor(chosen)].tolist()


def follows(
    reference: Reference, prompt: tuple[int, ...], output: Completion, begin: int = 0, end: int = 10**9
) -> None:
    """Tokens begin ... end of a greedy output are the reference's likeliest, with its log-probabilities."""
    logits_TV = reference.continuation(prompt, output.token_ids)
    span = slice(begin, min(end, len(output.token_ids)))
    assert output.token_ids[span] == logits_TV.argmax(-1).tolist()[span]
    assert output.logprobs[span] == pytest.approx(logprobs(logits_TV, output.token_ids)[span], abs=CLOSE)


# ---------------------------------------------------------------------------------------------------------- the model


def test_greedy_tokens_and_their_log_probabilities_are_the_models(engine, old):
    requests = [ask(text, max_tokens=24, ignore_eos=True) for text in TEXTS]
    for request, generation in zip(requests, Session(engine, *requests).finish(), strict=True):
        follows(old, request.prompt_token_ids, generation.outputs[0])
        assert len(generation.outputs[0].token_ids) == 24


def test_sampled_tokens_have_the_models_own_log_probabilities(engine, old):
    # Before temperature, bias and filters.
    request = ask("The quick", temperature=1.7, top_k=40, seed=3, logit_bias={5: 2.0}, max_tokens=30, ignore_eos=True)
    output = answer(engine, request)
    expected = logprobs(old.continuation(request.prompt_token_ids, output.token_ids), output.token_ids)
    assert output.logprobs == pytest.approx(expected, abs=CLOSE)


def test_alternatives_are_the_likeliest(engine, old):
    request = ask("The quick", temperature=1.0, seed=1, max_tokens=12, logprobs=3, ignore_eos=True)
    output = answer(engine, request)
    best = old.continuation(request.prompt_token_ids, output.token_ids).log_softmax(-1).topk(3)
    for found, values, ids in zip(output.top_logprobs, best.values.tolist(), best.indices.tolist(), strict=True):
        assert found == pytest.approx(dict(zip(ids, values, strict=True)), abs=CLOSE)


@pytest.mark.parametrize("text", ["The quick", LONG], ids=["short", "in chunks"])
def test_prompt_log_probabilities(engine, old, text):
    for request in (
        ask(text, prompt_logprobs=2, max_tokens=3, ignore_eos=True),
        ask(text, prompt_logprobs=2, max_tokens=0),
    ):
        prompt = request.prompt_token_ids
        generation = Session(engine, request).finish()[0]
        logits_TV = old.logits(list(prompt))[:-1]
        assert generation.prompt_logprobs == pytest.approx(logprobs(logits_TV, prompt[1:]), abs=CLOSE)
        best = logits_TV.log_softmax(-1).topk(2)
        for found, values, ids in zip(
            generation.prompt_top_logprobs, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            assert found == pytest.approx(dict(zip(ids, values, strict=True)), abs=CLOSE)
        assert len(generation.outputs[0].token_ids) == request.params.max_tokens
        assert generation.outputs[0].finish_reason == "length"


# ----------------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_sampling_of_the_likeliest_alone_is_greedy(engine, narrow):
    greedy = answer(engine, ask("The fox", max_tokens=16, ignore_eos=True))
    sampled = answer(engine, ask("The fox", max_tokens=16, ignore_eos=True, temperature=1.0, **narrow))
    assert sampled.token_ids == greedy.token_ids


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 3.0},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_samples_are_distributed_as_asked(engine, old, how):
    request = ask("over the", seed=11, n=128, max_tokens=1, ignore_eos=True, **how)
    counts = Counter(output.token_ids[0] for output in Session(engine, request).finish()[0].outputs)
    expected = filtered(old.logits(list(request.prompt_token_ids))[-1], **how)
    assert all(expected[token] > 0 for token in counts)
    for token, probability in enumerate(expected.tolist()):
        deviation = math.sqrt(128 * probability * (1 - probability))
        assert abs(counts[token] - 128 * probability) <= 4.5 * deviation + 1


def filtered(logits_V: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Probabilities after the filters, by their definitions: each sees what the one before it left."""
    probabilities = (logits_V.double() / temperature).softmax(-1)
    if min_p:
        probabilities[probabilities < min_p * probabilities.max()] = 0.0
    if top_k:
        probabilities[probabilities < probabilities.topk(top_k).values[-1]] = 0.0
    probabilities /= probabilities.sum()
    ordered = probabilities.sort(descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    probabilities[ordered.indices[before >= top_p]] = 0.0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "penalty",
    [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"frequency_penalty": -2.0},
        {"repetition_penalty": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_penalties(engine, old, penalty):
    request = ask("dog dog dog", max_tokens=24, ignore_eos=True, **penalty)
    prompt, output = request.prompt_token_ids, answer(engine, request)
    for t, logits_V in enumerate(old.continuation(prompt, output.token_ids)):
        assert output.token_ids[t] == penalised(logits_V, prompt, output.token_ids[:t], **penalty).argmax().item()
    assert output.logprobs == pytest.approx(
        logprobs(old.continuation(prompt, output.token_ids), output.token_ids), abs=CLOSE
    )


def penalised(
    logits_V: Tensor,
    prompt: tuple[int, ...],
    output: list[int],
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> Tensor:
    """By the definitions: Keskar et al. for repetition, OpenAI's for the other two."""
    logits = logits_V.tolist()
    for token in {*prompt, *output}:
        logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
    for token, count in Counter(output).items():
        logits[token] -= frequency_penalty * count + presence_penalty
    return torch.tensor(logits)


def test_logit_bias_forbids_and_forces(engine, old):
    free = answer(engine, ask("The fox", max_tokens=1))
    second = answer(engine, ask("The fox", max_tokens=1, logit_bias={free.token_ids[0]: -100.0}))
    assert second.token_ids == [old.logits(list(tokens("The fox")))[-1].topk(2).indices[1].item()]
    assert answer(engine, ask("The fox", max_tokens=5, logit_bias={77: 100.0})).token_ids == [77] * 5


def test_n_sequences_are_those_of_consecutive_seeds(engine):
    how = {"temperature": 1.3, "max_tokens": 12, "ignore_eos": True}
    outputs = Session(engine, ask("The fox", n=5, seed=21, **how)).finish()[0].outputs
    assert [output.index for output in outputs] == [0, 1, 2, 3, 4]
    single = [answer(engine, ask("The fox", seed=21 + i, **how)).token_ids for i in range(5)]
    assert [output.token_ids for output in outputs] == single
    assert len({tuple(ids) for ids in single}) == 5


def test_n_sequences_without_a_seed_differ(engine):
    request = ask("The fox", n=4, temperature=1.5, max_tokens=12, ignore_eos=True)
    outputs = Session(engine, request).finish()[0].outputs
    assert len({tuple(output.token_ids) for output in outputs}) == 4


def test_a_seed_gives_the_same_tokens_in_any_company(engine):
    how = {"temperature": 1.2, "top_p": 0.95, "max_tokens": 20, "ignore_eos": True}
    alone = answer(engine, ask("The fox", seed=4, **how))
    others = [ask(text, temperature=1.0, max_tokens=9 + 5 * i) for i, text in enumerate(TEXTS)]
    session = Session(engine, *others[:3], again := ask("The fox", seed=4, **how), *others[3:])
    session.finish()
    assert session.so_far(again) == alone.token_ids


# ------------------------------------------------------------------------------------------------------ where it ends


def test_a_stop_text_across_tokens_ends_the_output_and_is_not_shown(engine, letters):
    whole = answer(engine, ask("The fox", max_tokens=40, logit_bias=letters))
    first = len(tokenizer().decode(whole.token_ids[:7]))
    stop = whole.text[first - 1 : first + 3]  # the end of one token and the beginning of the next
    session = Session(engine, ask("The fox", max_tokens=40, logit_bias=letters, stop=("never said", stop)))
    output = session.finish()[0].outputs[0]
    at = whole.text.index(stop)
    needed = next(t for t in range(41) if stop in tokenizer().decode(whole.token_ids[:t]))
    assert (output.text, output.token_ids) == (whole.text[:at], whole.token_ids[:needed])
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_text_that_only_begins_like_a_stop_text_is_shown_in_the_end(engine, letters):
    whole = answer(engine, ask("The fox", max_tokens=20, logit_bias=letters))
    output = answer(engine, ask("The fox", max_tokens=20, logit_bias=letters, stop=(whole.text[-3:] + "?",)))
    assert (output.text, output.token_ids, output.finish_reason) == (whole.text, whole.token_ids, "length")


def test_stop_tokens_and_min_tokens(engine, letters):
    whole = answer(engine, ask("The fox", max_tokens=24, logit_bias=letters))
    stop = whole.token_ids[6]
    end = whole.token_ids.index(stop)
    output = answer(engine, ask("The fox", max_tokens=24, logit_bias=letters, stop_token_ids=(stop,)))
    assert output.token_ids == whole.token_ids[: end + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == tokenizer().decode(whole.token_ids[:end])
    later = ask("The fox", max_tokens=24, logit_bias=letters, stop_token_ids=(stop,), min_tokens=end + 4)
    output = answer(engine, later)
    assert stop not in output.token_ids[: end + 4]
    assert len(output.token_ids) >= end + 4


def test_the_models_own_end(engine):
    end = tokenizer().eod
    output = answer(engine, ask("The fox", max_tokens=8, logit_bias={end: 100.0}))
    assert (output.token_ids, output.finish_reason, output.stop_reason, output.text) == ([end], "stop", None, "")
    output = answer(engine, ask("The fox", max_tokens=8, logit_bias={end: 100.0}, ignore_eos=True))
    assert (output.token_ids, output.finish_reason) == ([end] * 8, "length")
    output = answer(engine, ask("The fox", max_tokens=8, logit_bias={end: 100.0}, min_tokens=5))
    assert end not in output.token_ids[:5]
    assert (output.token_ids[5:], output.finish_reason) == ([end], "stop")


def test_without_max_tokens_the_context_is_the_end(engine):
    request = ask("The fox", max_tokens=None, ignore_eos=True)
    output = answer(engine, request)
    assert (len(request.prompt_token_ids) + len(output.token_ids), output.finish_reason) == (CONTEXT, "length")


# ----------------------------------------------------------------------------------------------------------- the text


def test_text_comes_in_whole_characters_and_adds_up(engine):
    request = ask("The fox", regex="(日本|schöner|✓){6}", temperature=1.0, seed=2, max_tokens=100)
    session = Session(engine, request)
    output = session.finish()[0].outputs[0]
    assert re.fullmatch("(日本|schöner|✓){6}", output.text)
    assert output.text == tokenizer().decode(output.token_ids)
    assert all("\ufffd" not in piece.text for piece in session.outputs)
    assert len([piece for piece in session.outputs if piece.text]) > 6


def test_json_fits_its_schema(engine):
    schema = {
        "type": "object",
        "properties": {
            "size": {"type": "integer"},
            "colour": {"enum": ["red", "green"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["size", "colour", "tags"],
        "additionalProperties": False,
    }
    request = ask("JSON: ", json_schema=json.dumps(schema), temperature=1.0, seed=5, n=4, max_tokens=200)
    finished = [o for o in Session(engine, request).finish()[0].outputs if o.finish_reason == "stop"]
    assert finished
    for output in finished:
        found = json.loads(output.text)
        assert found.keys() == {"size", "colour", "tags"}
        assert isinstance(found["size"], int)
        assert found["colour"] in ("red", "green")
        assert len(found["tags"]) <= 3
        assert all(isinstance(tag, bool) for tag in found["tags"])


def test_any_json_and_regular_expressions_beside_free_requests(engine, old):
    free = ask("The fox", max_tokens=20, ignore_eos=True)
    phone = ask("Call ", regex=r"\d{3}-\d{4}", temperature=1.0, seed=3, max_tokens=30)
    anything = ask("JSON: ", json_schema="{}", temperature=1.0, seed=8, max_tokens=100)
    session = Session(engine, free, phone, anything)
    session.finish()
    follows(old, free.prompt_token_ids, session.collector.generations[free.id].outputs[0])
    assert re.fullmatch(r"\d{3}-\d{4}", session.collector.generations[phone.id].outputs[0].text)
    output = session.collector.generations[anything.id].outputs[0]
    assert output.finish_reason == "stop"
    json.loads(output.text)


# ------------------------------------------------------------------------------------------------------ many requests


def test_more_requests_than_sequences(engine, old):
    requests = [ask(TEXTS[i % 4], max_tokens=3 + i % 7, ignore_eos=True) for i in range(4 * SEQUENCES + 1)]
    session = Session(engine, *requests)
    most = 0
    while engine.has_unfinished():
        session.take(engine.step())
        most = max(most, engine.stats().running)
    assert most <= SEQUENCES
    for request in requests:
        output = session.collector.generations[request.id].outputs[0]
        follows(old, request.prompt_token_ids, output)
        assert len(output.token_ids) == request.params.max_tokens


def test_a_cache_too_small_for_all_changes_no_token(engine, old):
    before = engine.stats().preemptions
    requests = [ask(text, max_tokens=CONTEXT - len(tokens(text)), ignore_eos=True) for text in TEXTS[:4]]
    for request, generation in zip(requests, Session(engine, *requests).finish(), strict=True):
        follows(old, request.prompt_token_ids, generation.outputs[0])
    assert engine.stats().preemptions > before


def test_prompts_that_begin_alike_share_the_cache(engine, old):
    for expected in (False, True):
        request = ask(LONG, max_tokens=6, ignore_eos=True)
        generation = Session(engine, request).finish()[0]
        follows(old, request.prompt_token_ids, generation.outputs[0])
        if expected:
            assert 32 <= generation.cached_tokens < len(request.prompt_token_ids)


def test_a_flood_of_one_client_does_not_keep_another_waiting(engine):
    flood = [ask("dog", client="many", max_tokens=8, ignore_eos=True) for _ in range(6 * SEQUENCES)]
    session = Session(engine, *flood)
    session.take(engine.step())
    session.add(single := ask("fox", client="one", max_tokens=8, ignore_eos=True))
    session.step_until(lambda: bool(session.so_far(single)))
    assert sum(bool(session.so_far(request)) for request in flood) <= 3 * SEQUENCES


def test_counters(engine):
    before = engine.stats()
    requests = [ask(text, max_tokens=7, ignore_eos=True) for text in TEXTS[:3]]
    session = Session(engine, *requests)
    assert engine.stats().waiting + engine.stats().running == 3
    session.step_until(lambda: any(map(session.so_far, requests)))
    assert engine.stats().running > 0
    assert 0 < engine.stats().kv_usage <= 1
    session.finish()
    after = engine.stats()
    assert isinstance(after, Stats)
    assert after.prompt_tokens - before.prompt_tokens == sum(len(tokens(text)) for text in TEXTS[:3])
    assert after.generated_tokens - before.generated_tokens == 21
    assert after.finished - before.finished == 3
    assert (after.running, after.waiting, after.kv_usage) == (0, 0, 0.0)
    assert after.kv_blocks > 0


# ------------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("prompt", "params", "word"),
    [
        ((), {}, "empty"),
        ((5,) * CONTEXT, {"max_tokens": 1}, str(CONTEXT)),
        ((5,) * 20, {"max_tokens": CONTEXT - 19}, str(CONTEXT)),
        ((5,) * CONTEXT, {"max_tokens": None}, str(CONTEXT)),
        ((5, 100_000), {}, "vocabulary"),
        ((5, -1), {}, "vocabulary"),
        ((5,), {"logit_bias": {100_000: 1.0}}, "100000"),
        ((5,), {"stop_token_ids": (100_000,)}, "100000"),
        ((5,), {"json_schema": "{"}, "(?i)json"),
        ((5,), {"json_schema": '{"type": "no such type"}'}, "(?i)type"),
        ((5,), {"regex": "(unclosed"}, "(?i)regex"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_request_that_can_never_be_answered_is_refused_at_once(engine, old, prompt, params, word):
    other = ask("The fox", max_tokens=6, ignore_eos=True)
    session = Session(engine, other)
    session.take(engine.step())
    with pytest.raises(ValueError, match=word):
        engine.add(ask(prompt, **params))
    follows(old, other.prompt_token_ids, session.finish()[0].outputs[0])


def test_what_just_fits_is_answered(engine):
    output = answer(engine, ask((5,) * (CONTEXT - 1), max_tokens=1, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_an_id_is_free_again_when_its_request_has_ended(engine):
    request = ask("The fox", max_tokens=4)
    session = Session(engine, request)
    with pytest.raises(ValueError, match=request.id):
        engine.add(request)
    assert len(session.finish()[0].outputs[0].token_ids) == 4
    assert len(answer(engine, request).token_ids) == 4


# ---------------------------------------------------------------------------------------------------- abort and pause


def test_abort_frees_blocks_and_disturbs_nobody(engine, old):
    requests = [ask(text, max_tokens=30, ignore_eos=True, n=2) for text in TEXTS]
    session = Session(engine, *requests)
    session.step_until(lambda: len(session.so_far(requests[0])) >= 3)
    gone, kept = [requests[0].id, requests[-1].id], requests[1]  # one that runs and one that waits
    ends = engine.abort([*gone, "never heard of"])
    assert sorted((end.request_id, end.index, end.finish_reason) for end in ends) == sorted(
        (name, index, "abort") for name in gone for index in range(2)
    )
    session.take(ends)
    assert engine.abort(gone) == []
    engine.abort([request.id for request in requests[2:-1]])
    while engine.has_unfinished():
        outputs = engine.step()
        assert all(output.request_id == kept.id for output in outputs)
        session.take(outputs)
    for output in session.collector.generations[kept.id].outputs:
        follows(old, kept.prompt_token_ids, output)
        assert len(output.token_ids) == 30
    assert engine.stats().kv_usage == 0.0


def test_abort_of_everything_leaves_nothing(engine):
    session = Session(engine, *(ask(text, max_tokens=30) for text in TEXTS))
    session.take(engine.step())
    assert engine.stats().kv_usage > 0
    ends = engine.abort(list(session.collector.generations))
    assert len(ends) == len(TEXTS)
    assert not engine.has_unfinished()
    assert engine.step() == []
    assert engine.stats().kv_usage == 0.0


def test_pause_keeps_requests_and_takes_new_ones(engine, old):
    request = ask("The fox", max_tokens=12, ignore_eos=True)
    session = Session(engine, request)
    session.step_until(lambda: len(session.so_far(request)) >= 4)
    session.take(engine.pause("keep"))
    session.add(late := ask("The dog", max_tokens=5, ignore_eos=True))
    assert engine.step() == []
    assert engine.stats().paused
    assert engine.has_unfinished()
    engine.resume()
    assert not engine.stats().paused
    for made, length, generation in zip((request, late), (12, 5), session.finish(), strict=True):
        follows(old, made.prompt_token_ids, generation.outputs[0])
        assert len(generation.outputs[0].token_ids) == length


def test_pause_waits_for_what_runs_and_starts_nothing(engine):
    requests = [ask("The fox", max_tokens=6 + i, ignore_eos=True) for i in range(2 * SEQUENCES)]
    session = Session(engine, *requests)
    session.step_until(lambda: engine.stats().running == SEQUENCES)
    session.take(engine.pause("wait"))
    ended = [generation.finished for generation in session.collector.generations.values()]
    assert ended == [True] * SEQUENCES + [False] * SEQUENCES
    assert not any(map(session.so_far, requests[SEQUENCES:]))
    assert engine.stats().running == 0
    engine.resume()
    assert all(generation.finished for generation in session.finish())


def test_pause_can_abort(engine):
    session = Session(engine, *(ask("The fox", max_tokens=30) for _ in range(2 * SEQUENCES)))
    session.take(engine.step())
    session.take(engine.pause("abort"))
    assert {g.outputs[0].finish_reason for g in session.collector.generations.values()} == {"abort"}
    assert not engine.has_unfinished()
    assert engine.stats().kv_usage == 0.0


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("how", ["directory", "one chunk", "tensor by tensor"])
def test_an_update_in_flight_divides_old_from_new(engine, models, old, new, how):
    requests = [ask(text, max_tokens=20, ignore_eos=True) for text in TEXTS]
    session = Session(engine, *requests)
    session.step_until(lambda: len(session.so_far(requests[1])) >= 5)
    session.take(engine.start_weight_update("keep"))
    switch = {request.id: len(session.so_far(request)) for request in requests}
    weights = stored(models["new"])
    for chunk in {
        "directory": [str(models["new"])],
        "one chunk": [weights],
        "tensor by tensor": [{name: tensor} for name, tensor in weights.items()],
    }[how]:
        engine.update_weights(chunk)
        assert engine.step() == []
    for tensor in weights.values():  # whoever sent them may use the memory again
        tensor.fill_(float("nan"))
    engine.finish_weight_update(7)
    assert engine.version == engine.stats().version == 7
    session.finish()
    for request in requests:
        output, at = session.collector.generations[request.id].outputs[0], switch[request.id]
        follows(old, request.prompt_token_ids, output, 0, at)
        follows(new, request.prompt_token_ids, output, at)
        assert output.versions == [0] * at + [7] * (20 - at)
    assert 0 < sum(switch.values()) < 20 * len(requests)


def test_nothing_cached_of_the_old_weights_is_used(engine, models, new):
    answer(engine, ask(LONG, max_tokens=4))
    update(engine, str(models["new"]), 1)
    request = ask(LONG, max_tokens=4, ignore_eos=True)
    generation = Session(engine, request).finish()[0]
    assert generation.cached_tokens == 0
    follows(new, request.prompt_token_ids, generation.outputs[0])


def test_an_update_can_wait_or_abort(engine, models, old, new):
    running, waiting = ([ask("The fox", max_tokens=6, ignore_eos=True) for _ in range(SEQUENCES)] for _ in range(2))
    session = Session(engine, *running, *waiting)
    session.step_until(lambda: engine.stats().running == SEQUENCES)
    session.take(engine.start_weight_update("wait"))
    engine.update_weights(str(models["new"]))
    engine.finish_weight_update(2)
    session.finish()
    for group, version, reference in ((running, 0, old), (waiting, 2, new)):
        for request in group:
            output = session.collector.generations[request.id].outputs[0]
            assert output.versions == [version] * 6
            follows(reference, request.prompt_token_ids, output)
    session = Session(engine, *(ask("The fox", max_tokens=30) for _ in range(3)))
    session.take(engine.step())
    session.take(engine.start_weight_update("abort"))
    engine.update_weights(str(models["old"]))
    engine.finish_weight_update(3)
    assert not engine.has_unfinished()
    assert {g.outputs[0].finish_reason for g in session.collector.generations.values()} == {"abort"}
    request = ask("The fox", max_tokens=6, ignore_eos=True)
    follows(old, request.prompt_token_ids, answer(engine, request))


def test_an_update_leaves_a_paused_engine_paused(engine, models):
    engine.pause()
    update(engine, str(models["new"]), 4)
    assert engine.stats().paused
    session = Session(engine, ask("The fox", max_tokens=3, ignore_eos=True))
    assert engine.step() == []
    engine.resume()
    assert session.finish()[0].outputs[0].versions == [4, 4, 4]


def _wrong(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = "model.layers.1.mlp.down_proj.weight"
    if how == "unknown name":
        return weights | {"model.layers.9.mlp.down_proj.weight": weights[name]}
    return weights | {name: weights[name].T.contiguous()}


@pytest.mark.parametrize("whole_first", [False, True], ids=["at once", "after good chunks"])
@pytest.mark.parametrize("how", ["unknown name", "another shape", "no directory"])
def test_after_a_failed_update_no_token_is_of_half_new_weights(engine, models, old, new, tmp_path, how, whole_first):
    request = ask("The fox", max_tokens=20, ignore_eos=True)
    session = Session(engine, request)
    session.step_until(lambda: len(session.so_far(request)) >= 2)
    engine.start_weight_update()
    if whole_first:
        engine.update_weights({name: t for name, t in stored(models["new"]).items() if ".0." in name})
    given = str(tmp_path / "nowhere") if how == "no directory" else _wrong(stored(models["new"]), how)
    with pytest.raises(WeightUpdateError, match=r"layers\.\d\.mlp\.down_proj|nowhere"):
        engine.update_weights(given)
    if engine.stats().health == "ready":  # nothing was changed: the old weights go on
        session.step_until(lambda: len(session.so_far(request)) >= 6)
    else:
        with pytest.raises((ValueError, WeightUpdateError), match="stale"):
            engine.add(ask("The dog"))
        with suppress(WeightUpdateError):
            assert engine.step() == []
    assert engine.has_unfinished()
    update(engine, stored(models["new"]), 6)
    assert engine.stats().health == "ready"
    output = session.finish()[0].outputs[0]
    at = output.versions.index(6)
    assert output.versions == [0] * at + [6] * (20 - at)
    follows(old, request.prompt_token_ids, output, 0, at)
    follows(new, request.prompt_token_ids, output, at)


def test_an_update_has_to_be_started(engine, models):
    with pytest.raises(RuntimeError, match="start_weight_update"):
        engine.update_weights(str(models["new"]))
    with pytest.raises(RuntimeError, match="start_weight_update"):
        engine.finish_weight_update(3)
    assert engine.stats().health == "ready"
