"""Megatron's PUT /api: every field does what its name says, and what is wrong is HTTP 400 with a reason."""

import httpx
import pytest

from raytron.inference import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm(model_path):
    engine = LLM(model_path, dtype="fp32", kv_cache_mb=8.0, threads=1)
    yield engine
    engine.close()


def put(live, **fields) -> dict:
    answer = httpx.put(f"{live.url}/api", json=fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def generated(live, **fields) -> list[int]:
    """The new tokens for the prompt "ab"."""
    return put(live, prompts=["ab"], **fields)["tokens"][0][2:]


def test_the_answer_is_prompt_and_continuation(live, llm):
    prompts = ["hello", "hi there"]
    found = put(live, prompts=prompts, tokens_to_generate=6, top_k=1, logprobs=True, top_n_logprobs=3)
    params = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=3, logprobs=3)
    for i, one in enumerate(llm.generate(prompts, params)):
        output = one.outputs[0]
        assert found["tokens"][i] == [*one.prompt_token_ids, *output.token_ids]
        assert found["text"][i].startswith(prompts[i])
        assert found["logprobs"][i] == pytest.approx([*one.prompt_logprobs, *output.logprobs], abs=1e-5)
        assert len(found["segments"][i]) == len(found["tokens"][i]) == len(found["top_n_logprobs"][i]) + 1
        assert {len(top) for top in found["top_n_logprobs"][i]} == {3}


def test_64_tokens_unless_told_otherwise(live):
    assert max(len(row) - 2 for row in put(live, prompts=["ab"] * 16, random_seed=0)["tokens"]) == 64
    scored = put(live, prompts=["hello"], tokens_to_generate=0, logprobs=True)
    assert (scored["text"], len(scored["logprobs"][0])) == (["hello"], 4)


def test_a_seed_repeats(live):
    ask = {"tokens_to_generate": 12, "random_seed": 3, "temperature": 2.0}
    assert generated(live, **ask) == generated(live, **ask)
    assert generated(live, **ask) != generated(live, **{**ask, "random_seed": 4})
    same = put(live, prompts=["ab", "ab"], **ask)["tokens"]
    assert same[0] != same[1]


def test_top_p_decays_to_its_bound(live):
    greedy = generated(live, tokens_to_generate=30, top_k=1)
    ask = {"tokens_to_generate": 30, "temperature": 3.0, "random_seed": 0}
    assert generated(live, top_p=1.0, top_p_decay=0.0001, **ask)[1:] != greedy[1:]  # the first is free, then all follow
    first = generated(live, top_p=1.0, top_p_decay=0.0001, **ask)[0]
    followed = put(live, prompts=["ab"], top_p=1.0, top_p_decay=0.0001, **ask)["tokens"][0]
    alone = httpx.post(
        f"{live.url}/v1/completions",
        json={"prompt": [97, 98, first], "max_tokens": 29, "temperature": 0, "return_token_ids": True},
    ).json()
    assert followed[3:] == alone["choices"][0]["token_ids"]
    bound = generated(live, top_p=1.0, top_p_decay=0.0001, top_p_bound=1.0, **ask)
    assert bound[1:] != followed[3:]


def test_no_newline_after_a_colon(live):
    colon, newline = ord(":"), ord("\n")
    ask = {"prompts": ["a:"] * 128, "tokens_to_generate": 1, "temperature": 100.0, "random_seed": 1}
    seen = {row[2] for _ in range(8) for row in put(live, **{**ask, "random_seed": _})["tokens"]}
    assert newline in seen  # at this temperature anything comes, unless it is forbidden
    rows = [row for _ in range(8) for row in _colons(live, {**ask, "random_seed": _})]
    assert all(row[:2] == [97, colon] and row[2] != newline for row in rows)


def _colons(live, ask: dict) -> list[list[int]]:
    return put(live, prevent_newline_after_colon=True, **ask)["tokens"]


def test_what_ends_an_answer(live):
    free = generated(live, tokens_to_generate=40, random_seed=9)
    stop = free[10]
    assert generated(live, tokens_to_generate=40, random_seed=9, stop_token=stop) == free[: free.index(stop) + 1]
    lines = put(live, prompts=["a"] * 64, tokens_to_generate=100, temperature=100.0, random_seed=0, stop_on_eol=True)
    ended = [row[1:] for row in lines["tokens"] if len(row) < 101 and row[-1] == 10]
    assert ended
    assert all(10 not in row[:-1] for row in ended)
    double = put(live, prompts=["a\n"], tokens_to_generate=9, random_seed=0, stop_on_double_eol=True, stop_on_eol=False)
    assert "\n\n" not in double["text"][0][2:-2]


def test_bos_comes_first(live):
    assert put(live, prompts=["x", ""], tokens_to_generate=2, add_BOS=True)["tokens"][0][:2] == [256, ord("x")]


def test_beams_are_the_likeliest(live, llm):
    greedy = llm.generate(["ab"], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))[0].outputs[0]
    for penalty in (0.0, 1.0, 2.0):
        found = put(live, prompts=["ab"], tokens_to_generate=4, beam_width=4, length_penalty=penalty, stop_token=259)
        assert found["scores"] == sorted(found["scores"], reverse=True)
        scored = llm.generate(found["tokens"], SamplingParams(max_tokens=0, prompt_logprobs=0))
        made = [one.prompt_logprobs[1:] for one in scored]
        assert found["scores"] == pytest.approx([sum(row) / len(row) ** penalty for row in made], abs=1e-4)
        assert found["scores"][0] >= sum(greedy.logprobs) / 4**penalty - 1e-5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompts": None}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": "x"}, "prompts"),
        ({"prompts": ["x"] * 129}, "prompts"),
        ({"prompts": [""]}, "need add_BOS"),
        ({"tokens_to_generate": -1}, "tokens_to_generate"),
        ({"tokens_to_generate": "5"}, "tokens_to_generate"),
        ({"tokens_to_generate": 0}, "needs logprobs"),
        ({"tokens_to_generate": 1000}, "context is 512"),
        ({"logprobs": 5}, "logprobs"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"top_k": 1001}, "top_k"),
        ({"top_k": 5, "top_p": 0.5}, "exclude each other"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p_decay": 0.5}, "needs top_p"),
        ({"top_p": 0.5, "top_p_bound": 0.6}, "must not exceed top_p"),
        ({"add_BOS": "yes"}, "add_BOS"),
        ({"random_seed": -5}, "random_seed"),
        ({"stop_token": 100_000}, "outside the vocabulary"),
        ({"length_penalty": "long"}, "length_penalty"),
        ({"max_len": 5}, "say tokens_to_generate"),
        ({"sentences": ["x"]}, "say prompts"),
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 2, "prompts": ["a", "b"]}, "one prompt"),
        ({"no_log": 1}, "no_log"),
        ({"nonsense": 1}, "unknown field"),
    ],
)
def test_wrong_fields_are_http_400(live, fields, says):
    answer = httpx.put(f"{live.url}/api", json={"prompts": ["x"], "tokens_to_generate": 2, **fields})
    assert answer.status_code == 400
    assert says in answer.json()["message"]
    assert answer.json()["error"]["message"] == answer.json()["message"]


def test_only_put(live):
    assert httpx.post(f"{live.url}/api", json={"prompts": ["x"]}).status_code == 405
