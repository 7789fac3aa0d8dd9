"""A reward model's verdicts: what it reads, what becomes of them in an episode, and that no failure is a zero."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raytron.data.tokenizer import ByteTokenizer
from raytron.inference import Scorer
from raytron.models import read_arch
from raytron.rl.config import JudgeConfig, RewardConfig, RewardModelConfig, RLConfig, TaskConfig
from raytron.rl.environments import Generated, Prompt
from raytron.rl.rewards import ModelReward, chosen_label, overall, reader
from raytron.rl.scorers import Scorers
from raytron.rl.tasks import build
from tests.inference.classifiers import random_classifier, scores_of
from tests.rl.players import play

PROMPT = Prompt(3, (5, 6, 7), "right", "<user>Why?<assistant>", question="Why?")
ANSWER = Generated((8, 9, 1), (0.0,) * 3, (0,) * 3, text="Because.")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A classifier of three labels that reads bytes, and its oracle's scores of what it should read."""
    path, _ = random_classifier(tmp_path_factory.mktemp("reward"), labels=3, vocabulary=260)
    ByteTokenizer().save(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def reward(folder: Path, template: str | None, label: int = 0) -> ModelReward:
    scorer = Scorer(None, folder)

    async def score(tokens):
        return scorer.score([tokens])[0]

    return ModelReward(score, read_arch(folder), reader(str(folder), template), label)


@pytest.mark.parametrize(
    ("template", "read"),
    [
        (None, [5, 6, 7, 8, 9, 1]),
        ("chat", list(b"<user>Why?<assistant>Because.")),
        ("Q {prompt} A {response}", list(b"Q Why? A Because.")),
    ],
)
def test_a_score_is_that_of_what_it_reads(folder, template, read):
    from transformers import LlamaForSequenceClassification

    wanted = scores_of(LlamaForSequenceClassification.from_pretrained(folder).eval(), [read])[0]
    for label in range(3):
        found = asyncio.run(reward(folder, template, label)(PROMPT, ANSWER))
        assert found == pytest.approx(wanted[label], abs=1e-5)


def test_what_it_cannot_read_is_said_before_anything_runs(folder, tmp_path):
    arch = read_arch(folder)
    for label in (None, 3, -1):
        with pytest.raises(ValueError, match="gives 3 scores"):
            chosen_label(str(folder), arch, label)
    assert chosen_label("one", arch.replace(num_labels=1), None) == 0
    with pytest.raises(ValueError, match="a language model"):
        chosen_label("none", arch.replace(num_labels=0), None)
    with pytest.raises(ValueError, match=r"has no \{response\}"):
        reader(str(folder), "Q {prompt}")
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        reader(str(tmp_path), "chat")
    small, _ = random_classifier(tmp_path / "small", vocabulary=8)
    config = RLConfig(reward=RewardConfig(model=RewardModelConfig(path=str(small))))
    with pytest.raises(ValueError, match=r"needs a reward\.model\.template"):
        Scorers(config, build(config.task))
    with pytest.raises(ValueError, match="name one"):
        Scorers(RLConfig(reward=RewardConfig(task=0.5)), build(TaskConfig()))
    judge = JudgeConfig(url="http://localhost/v1", model="m", api_key_env="RAYTRON_TEST_NO_SUCH_KEY")
    with pytest.raises(ValueError, match="which is not set"):
        Scorers(RLConfig(reward=RewardConfig(judge=judge)), build(TaskConfig()))


COPY = build(TaskConfig("copy", {"length": 2}))


async def worth(prompt: Prompt, answer: Generated) -> float:
    """How many tokens there are."""
    return float(len(prompt.token_ids) + len(answer.token_ids))


async def broken(prompt: Prompt, answer: Generated) -> float:
    raise RuntimeError("no scorer is left")


def episode(judge, weight: float, wrong: bool = False):
    prompt = COPY.prompt(0)
    said = (2, *prompt.answer[1:]) if wrong else prompt.answer
    return play(COPY, prompt, lambda context: said, overall=overall(judge, weight))


def test_an_episode_is_worth_what_is_said_of_the_whole():
    assert episode(worth, 0.0).reward == 4 + 3
    assert episode(worth, 0.5).reward == 4 + 3 + 0.5
    right, wrong = episode(worth, 10.0), episode(worth, 10.0, wrong=True)
    assert right.reward == 17
    assert wrong.reward == 7 + 10 * wrong.info["task_reward"] < right.reward
    assert right.info["task_reward"] == 1.0


def test_a_reward_that_fails_leaves_the_episode_out():
    for weight in (0.0, 1.0):
        found = episode(broken, weight)
        assert found.reward is None
        assert "no scorer is left" in found.info["error"]
        assert found.length == 3


def test_what_the_task_cannot_judge_counts_only_where_it_has_a_weight():
    class Silent(type(COPY)):
        def environment(self):
            async def judge(prompt, answer):
                from raytron.rl.environments import Verdict

                return Verdict(None, "it hangs")

            from raytron.rl.environments import SingleTurn

            return SingleTurn(judge)

    task, prompt = Silent(length=2), COPY.prompt(0)
    alone = play(task, prompt, lambda context: prompt.answer, overall=overall(worth))
    assert (alone.reward, "error" in alone.info) == (7.0, False)
    both = play(task, prompt, lambda context: prompt.answer, overall=overall(worth, 1.0))
    assert (both.reward, both.info["error"]) == (None, "it hangs")


def test_the_whole_of_several_turns_is_judged():
    task = build(TaskConfig("calculator"))
    prompt = task.prompt(0)
    call, value = prompt.answer
    seen = []

    async def judge(prompt: Prompt, answer: Generated) -> float:
        seen.append((prompt.token_ids, answer.token_ids, answer.text))
        return 2.0

    said = iter([call, value])
    found = play(task, prompt, lambda context: next(said), overall=overall(judge, 3.0))
    assert found.reward == pytest.approx(2.0 + 3.0 * found.info["task_reward"])
    assert seen == [(prompt.token_ids, tuple(found.tokens[len(prompt.token_ids) :]), task.decode(seen[0][1]))]
    assert np.isin(call, seen[0][1]).all()
    assert replace(prompt, token_ids=()).asked == prompt.text
