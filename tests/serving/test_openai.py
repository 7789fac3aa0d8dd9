"""OpenAI's own client against a live server: what it asks for is what it gets, and what it may not it is told."""

import json

import httpx
import openai
import pytest

from raytron.inference import LLM, SamplingParams

HELLO = [{"role": "user", "content": "hello"}]
PROMPT_OF_HELLO = "<user>hello\n<assistant>"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Bergen"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
BAD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}


@pytest.fixture(scope="module")
def llm(model_path):
    """The same model without HTTP."""
    engine = LLM(model_path, dtype="fp32", kv_cache_mb=8.0, threads=1)
    yield engine
    engine.close()


def streamed_text(chunks) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def test_a_completion_is_what_the_model_says(client, llm):
    expected = llm.generate(["hello"], SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
    whole = client.completions.create(model="tiny", prompt="hello", max_tokens=20, temperature=0)
    chunks = client.completions.create(model="tiny", prompt="hello", max_tokens=20, temperature=0, stream=True)
    assert whole.choices[0].text == streamed_text(chunks) == expected.text
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 20)


def test_token_ids_are_a_prompt_too(client):
    ask = {"model": "tiny", "max_tokens": 10, "temperature": 0}
    by_text = client.completions.create(prompt="hello", **ask).choices[0].text
    by_ids = client.completions.create(prompt=list(b"hello"), **ask).choices[0].text
    assert by_text == by_ids


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_and_many_answers_keep_their_places(client, stream):
    ask = {"model": "tiny", "max_tokens": 8, "seed": 5, "stream": stream}
    prompts = ["one", "two", "three"]
    alone = []
    for prompt in prompts:
        answer = client.completions.create(prompt=prompt, n=2, **{**ask, "stream": False})
        alone += [choice.text for choice in answer.choices]
    together = client.completions.create(prompt=prompts, n=2, **ask)
    texts = [""] * 6
    for chunk in together if stream else [together]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == alone
    assert len(set(texts)) == 6


def test_a_chat_is_its_template_completed(client):
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    said = client.chat.completions.create(messages=HELLO, **ask)
    assert said.choices[0].message.role == "assistant"
    assert said.choices[0].message.content == client.completions.create(prompt=PROMPT_OF_HELLO, **ask).choices[0].text
    assert said.usage.prompt_tokens == len(PROMPT_OF_HELLO)


def test_a_streamed_chat_says_the_same_and_tells_its_usage(client):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**ask)
    *chunks, last = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks].count("length") == 1
    assert not last.choices
    assert last.usage == whole.usage


def test_parts_of_a_message_are_one_text(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    in_parts = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **ask)
    assert (
        in_parts.choices[0].message.content
        == client.chat.completions.create(messages=HELLO, **ask).choices[0].message.content
    )


def test_logprobs_of_a_completion(client, llm):
    ask = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0, "logprobs": 3}
    expected = llm.generate(["hello"], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
    found = client.completions.create(**ask).choices[0].logprobs
    assert found.token_logprobs == pytest.approx(expected.logprobs, abs=1e-6)
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 3
    parts = [choice.logprobs for chunk in client.completions.create(stream=True, **ask) for choice in chunk.choices]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert [offset for part in parts for offset in part.text_offset] == found.text_offset


def test_echo_scores_the_prompt(client):
    scored = client.completions.create(model="tiny", prompt="hello", max_tokens=0, echo=True, logprobs=0).choices[0]
    assert scored.text == "hello"
    assert scored.logprobs.tokens == list("hello")
    assert scored.logprobs.token_logprobs[0] is None
    step = client.completions.create(
        model="tiny", prompt="hell", max_tokens=1, logprobs=20, extra_body={"regex": "o"}
    ).choices[0]
    assert step.logprobs.token_logprobs[0] == pytest.approx(scored.logprobs.token_logprobs[-1], abs=1e-5)


def test_logprobs_of_a_chat(client):
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "logprobs": True, "top_logprobs": 2, "seed": 1}
    whole = client.chat.completions.create(**ask).choices[0].logprobs.content
    chunks = client.chat.completions.create(stream=True, **ask)
    pieces = [c.choices[0].logprobs.content for c in chunks if c.choices and c.choices[0].logprobs]
    assert [token for piece in pieces for token in piece] == whole
    assert len(whole) == 6
    assert all(len(token.top_logprobs) == 2 for token in whole)


def test_a_seed_repeats_and_stop_ends(client):
    ask = {"model": "tiny", "prompt": "x", "max_tokens": 40, "seed": 7}
    first = client.completions.create(**ask).choices[0]
    assert client.completions.create(**ask).choices[0].text == first.text
    stop = next(character for character in first.text[5:] if character != "�")
    stopped = client.completions.create(stop=[stop], **ask).choices[0]
    assert stopped.text == first.text[: first.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)


def test_vllms_fields_reach_the_engine(client):
    ask = {"model": "tiny", "prompt": "x", "max_tokens": 12}
    greedy = client.completions.create(temperature=0, **ask).choices[0].text
    assert client.completions.create(extra_body={"top_k": 1}, **ask).choices[0].text == greedy
    assert client.completions.create(extra_body={"min_p": 1.0}, **ask).choices[0].text == greedy
    digits = client.completions.create(extra_body={"regex": "[0-9]{12}"}, **ask).choices[0].text
    assert digits.isdecimal()
    told = client.completions.create(
        extra_body={"return_token_ids": True, "return_weight_versions": True}, **ask
    ).choices[0]
    assert len(told.token_ids) == 12
    assert told.weight_versions == [{"version": 0, "tokens": 12}]


def test_answers_of_a_json_schema(client):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    said = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, max_tokens=200, seed=1)
    person = json.loads(said.choices[0].message.content)
    assert person.keys() == {"name", "age"}
    assert person["age"] in range(10)
    assert said.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is(client, stream):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        said = client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[WEATHER], tool_choice=choice, max_tokens=120, seed=2, stream=stream
        )
        if stream:
            deltas = [chunk.choices[0] for chunk in said]
            calls = [call for delta in deltas for call in delta.delta.tool_calls or ()]
            reason = deltas[-1].finish_reason
            assert not any(delta.delta.content for delta in deltas)
        else:
            calls, reason = said.choices[0].message.tool_calls, said.choices[0].finish_reason
        assert calls[0].function.name == "weather"
        assert json.loads(calls[0].function.arguments)["city"] in ("Oslo", "Bergen")
        assert reason == ("tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_is_found_in_what_the_model_writes(client, stream):
    written = 'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    pattern = "".join(f"\\{c}" if c in ".{}" else c for c in written)
    ask = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "max_tokens": 150, "extra_body": {"regex": pattern}}
    said = client.chat.completions.create(stream=stream, **ask)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in said]
        content = "".join(delta.content or "" for delta in deltas)
        (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
    else:
        content = said.choices[0].message.content
        (call,) = said.choices[0].message.tool_calls
    assert content == "Let me see. "
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    history = [
        *HELLO,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    assert client.chat.completions.create(model="tiny", messages=history, tools=[WEATHER], max_tokens=3).choices


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="not served here; there is tiny"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "gpt"}, "not served here"),
        ({"max_tokens": 600}, "context is 512 tokens"),
        ({"prompt": "x" * 600}, "context is 512 tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [5, "five"]}, "prompt"),
        ({"prompt": [300]}, "outside the vocabulary"),
        ({"prompt": ["x"] * 129}, "129 prompts"),
        ({"prompt": ["x"] * 100, "n": 128}, "prompts x n"),
        ({"n": 10_000}, "n: "),
        ({"n": 0}, "n: "),
        ({"n": 1.5}, "n: "),
        ({"stop": ["x"] * 1000}, "stop: at most 64"),
        ({"stop": [""]}, "stop: "),
        ({"stop": 5}, "stop: "),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logprobs": 50}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "invalid literal"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "outside the vocabulary"),
        ({"suffix": "end"}, "suffix: isn't supported"),
        ({"extra_body": {"max_token": 5}}, "unknown field 'max_token'"),
        ({"extra_body": {"regex": "("}}, "regex"),
        ({"extra_body": {"min_tokens": 50}}, "min_tokens"),
        ({"extra_body": {"regex": "a", "structured_outputs": {"json": {}}}}, "exclude each other"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_completion_is_refused_with_a_reason(client, change, says, stream):
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(**{"model": "tiny", "prompt": "x", "stream": stream, **change})
    assert 400 <= refused.value.status_code < 500
    assert says in refused.value.body["message"]
    assert set(refused.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "user needs content"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "only text"),
        ({"messages": HELLO * 2000}, "at most 1024"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "needs json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
            "json_schema",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tools doesn't have"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "may not set messages"),
    ],
)
def test_a_bad_chat_is_refused_with_a_reason(client, change, says):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 3, **change})
    assert says in refused.value.body["message"]


def test_tokens_there_and_back(live):
    text = "søt ☃ tekst"
    found = httpx.post(f"{live.url}/tokenize", json={"model": "tiny", "prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == list(text.encode())
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = httpx.post(f"{live.url}/detokenize", json={"model": "tiny", "tokens": found["tokens"]}).json()
    assert back == {"prompt": text}
    beyond = httpx.post(f"{live.url}/detokenize", json={"model": "tiny", "tokens": [1, 10**9]})
    assert beyond.status_code == 400
    assert "token 1000000000 is not in the vocabulary" in beyond.json()["error"]["message"]
    chat = httpx.post(f"{live.url}/tokenize", json={"messages": HELLO}).json()
    assert bytes(chat["tokens"]).decode() == PROMPT_OF_HELLO


def test_metrics_count_what_was_answered(live, client):
    def read(name: str) -> float:
        lines = httpx.get(f"{live.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    names = (
        "raytron_prompt_tokens_total",
        "raytron_generated_tokens_total",
        "raytron_time_to_first_token_seconds_count",
    )
    before = [read(name) for name in names]
    client.completions.create(model="tiny", prompt="hello", max_tokens=7)
    assert [read(name) - was for name, was in zip(names, before, strict=True)] == [5, 7, 1]
    assert read("raytron_engine_kv_usage") == 0
