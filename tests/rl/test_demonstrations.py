"""Demonstrations are the task's own episodes, rightly answered, and come back from the file as they were."""

from __future__ import annotations

import json

import pytest

from raytron.config import SFTDataConfig
from raytron.data import build_sft_datasets, load_tokenizer, prepare_examples
from raytron.rl.config import TaskConfig
from raytron.rl.demonstrations import demonstrations, write_demonstrations
from raytron.rl.tasks import GSM8K, HigherLower, build


@pytest.mark.parametrize("name", ["echo-digit", "copy", "reverse", "countdown", "calculator"])
def test_every_demonstration_earns_the_whole_reward(name):
    task = build(TaskConfig(name), seed=2)
    for index, episode in enumerate(demonstrations(task, 30, first=5)):
        assert episode.reward == 1.0
        assert tuple(episode.tokens[: len(task.prompt(5 + index).token_ids)]) == task.prompt(5 + index).token_ids
        assert not episode.chosen[: len(task.prompt(5 + index).token_ids)].any()
        assert episode.tokens[episode.chosen][-1] == task.eos_token_ids[0]
        assert not episode.truncated


def test_what_a_tool_says_is_not_chosen():
    task = build(TaskConfig("calculator"))
    for episode in demonstrations(task, 10):
        asked, _, result = task.decode(episode.tokens[episode.chosen]).partition(" = ")
        assert task.decode(episode.tokens) == f"{asked} = {asked} = {result} {result}"


def test_the_file_is_read_back_token_for_token_by_the_tokenizer_beside_it(tmp_path):
    task = build(TaskConfig("calculator"))
    path = write_demonstrations(task, tmp_path, 20)
    played = list(demonstrations(task, 20))
    config = SFTDataConfig(
        path=str(path), tokenizer=str(tmp_path), sequence_length=32, cache_path=str(tmp_path / "cache")
    )
    prepared = prepare_examples(config, config.tokenizer)
    dataset, _ = build_sft_datasets(config, prepared, 1, epochs=1)
    examples = dataset.examples
    for i, episode in enumerate(played):
        span = slice(examples.starts[i], examples.starts[i + 1])
        assert (examples.tokens[span] == episode.tokens).all()
        assert (examples.chosen[span] == episode.chosen).all()
    assert (prepared.vocab_size, prepared.eod) == (task.vocab_size, task.eos_token_ids[0])
    own = load_tokenizer(tmp_path)
    first = json.loads(path.read_text().splitlines()[0])
    assert own.encode(first["text"]) == first["tokens"]


def test_a_model_s_directory_is_the_tokenizer_of_a_task_of_texts(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "3 + 4?", "answer": "It is 7.\\n#### 7"}\n' * 3)
    options = {"path": str(tmp_path / "gsm8k.jsonl"), "evaluation_size": 1, "instruction": ""}
    task = build(TaskConfig("gsm8k", options), model="byte")
    assert isinstance(task, GSM8K)
    (episode,) = demonstrations(task, 1)
    assert episode.reward == 1.0
    assert task.decode(episode.tokens) == "Question: 3 + 4?\nAnswer: It is 7.\n#### 7"
    assert build(TaskConfig("gsm8k", options | {"tokenizer": "null:9"}), model="byte").tokenizer == "null:9"


def test_a_task_without_solutions_says_so():
    with pytest.raises(ValueError, match="HigherLower gives no `solution` with its prompts"):
        list(demonstrations(HigherLower(), 1))
