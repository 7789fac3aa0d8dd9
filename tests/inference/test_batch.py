"""A file of prompts: each answered once, however often the job is cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytron.checkpoint import save_pretrained
from raytron.cli import main
from raytron.data import ByteTokenizer
from raytron.data.chat import ChatTemplate
from raytron.inference import LLM, SamplingParams
from raytron.inference.batch import generate_file, read_prompts
from raytron.models import build
from raytron.models.arch import DecoderConfig

ARCH = DecoderConfig(
    vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, eos_token_id=256,
)  # fmt: skip
PARAMS = SamplingParams(max_tokens=6, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "model"
    save_pretrained(build(ARCH, seed=0), path, tokenizer=ByteTokenizer())
    return path


@pytest.fixture
def prompts(tmp_path) -> Path:
    lines = [
        {"prompt": "one"},
        {"prompt_token_ids": [1, 2, 3], "n": 2},
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
        {"prompt": "four", "temperature": 0, "id": "last"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_job_cut_off_goes_on_and_ends_as_one_that_was_not(model, prompts, tmp_path):
    render = ChatTemplate(str(model)).render
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    with LLM(model, kv_cache_mb=4, max_num_seqs=2) as llm:
        first = generate_file(llm, prompts, whole, PARAMS, render=render)
        assert (first.prompts, first.kept) == (4, 0)
        found = records(whole)
        assert [r["index"] for r in found] == [0, 1, 2, 3]
        assert [len(r["outputs"]) for r in found] == [1, 2, 1, 1]
        assert found[3]["id"] == "last"
        assert len(found[2]["outputs"][0]["token_ids"]) == 3
        assert first.tokens == sum(len(o["token_ids"]) for r in found for o in r["outputs"])

        cut.write_text("".join(whole.read_text().splitlines(keepends=True)[2:3]) + '{"index": 0, "prom')
        again = generate_file(llm, prompts, cut, PARAMS, render=render)
        assert (again.prompts, again.kept) == (3, 1)
        assert records(cut) == found
        assert generate_file(llm, prompts, cut, PARAMS, render=render).prompts == 0
        assert not llm.engine.has_unfinished()

        other = tmp_path / "other.jsonl"
        other.write_text(prompts.read_text().replace("one", "eins"))
        with pytest.raises(ValueError, match="other prompts"):
            generate_file(llm, other, cut, PARAMS, render=render)
        assert records(cut) == found


def test_the_command_does_the_same(model, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    main(["generate", str(model), str(prompts), "--output", str(output), "--max-tokens", "6", "--quiet"])
    assert "4 prompts answered" in capsys.readouterr().out
    assert len(records(output)) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "one of prompt"),
        ('{"prompt": "a", "messages": []}', "one of prompt"),
        ('{"prompt": 3}', "must be a text"),
        ('{"prompt_token_ids": ["a"]}', "list of integers"),
        ('{"prompt": "a", "temprature": 1}', "temprature"),
        ('{"prompt": "a", "temperature": -1}', "temperature"),
        ('{"prompt": "a", "top_p": "x"}', "top_p"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        list(read_prompts(path, PARAMS))
    assert f"{path}:2" in str(caught.value)
