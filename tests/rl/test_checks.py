"""Verifiers in processes of their own: what they find, and that one which hangs or dies costs one verdict only."""

from __future__ import annotations

import asyncio

import pytest

from raytron.rl.environments import Generated, Prompt
from raytron.rl.rewards import CheckError, Fits, Matches, Maths, judged

SLOW_PATTERN, SLOW_TEXT = "(a+)+b", "a" * 40
TOWER = "$9^{9^{9^{9^{9^{9}}}}}$"


@pytest.fixture(scope="module")
def maths():
    reward = Maths(workers=1, timeout_s=20.0)
    yield reward
    reward.close()


def ask(reward, answer, text):
    return asyncio.run(reward(Prompt(0, (), answer=answer), Generated((), (), (), text=text)))


@pytest.mark.parametrize(
    ("answer", "text", "worth"),
    [
        ("1/2", r"so the probability is $\frac{1}{2}$", 1.0),
        (r"\frac12", "I get 0.5", 1.0),
        (r"$\frac{1}{2}$", r"thus \boxed{\dfrac{1}{2}}", 1.0),
        ("72", r"48/2 = 24, so \boxed{72}.", 1.0),
        ("72", "#### 72", 1.0),
        ("1234", r"\boxed{1,234}", 1.0),
        (r"x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
        (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}", 1.0),
        (r"\sqrt{8}", r"$2\sqrt{2}$", 1.0),
        (r"\$18", "18 dollars", 1.0),
        ("-5", "$x = -5$", 1.0),
        ("72", r"\boxed{71}", 0.0),
        ("72", r"\boxed{72} is wrong; it is \boxed{73}", 0.0),
        ("72", "I do not know", 0.0),
        ("72", "", 0.0),
        (r"\frac12", r"$\frac{1}{3}$", 0.0),
    ],
)
def test_maths(maths, answer, text, worth):
    assert ask(maths, answer, text) == worth


def test_a_reference_without_mathematics_is_an_error(maths):
    with pytest.raises(CheckError, match="no mathematical expression"):
        ask(maths, "", r"\boxed{1}")


def test_mathematics_that_hangs_is_no_verdict_and_the_next_answer_gets_one():
    reward = Maths(workers=1, timeout_s=1.0)
    try:
        verdict = ask(judged(reward), "1", TOWER)
        assert verdict.reward is None
        assert "TimeoutError" in verdict.reason
        assert ask(reward, "1", "$1$") == 1.0
    finally:
        reward.close()


def test_a_pattern_that_hangs_is_no_verdict_and_the_next_answer_gets_one():
    reward = Matches(SLOW_PATTERN, workers=1, timeout_s=0.5)
    try:
        verdict = ask(judged(reward), None, SLOW_TEXT)
        assert verdict.reward is None
        assert "TimeoutError" in verdict.reason
        assert ask(reward, None, "aab") == 1.0
    finally:
        reward.close()


def test_matches_the_whole_text():
    reward = Matches(workers=1)
    try:
        assert ask(reward, r"<think>.*</think>\d+", "<think>a\nb</think>42") == 1.0
        assert ask(reward, r"\d+", "42 or so") == 0.0
        with pytest.raises(CheckError, match="unterminated"):
            ask(reward, "(", "42")
    finally:
        reward.close()


def test_fits_a_schema():
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    reward = Fits(workers=1)
    try:
        assert ask(reward, schema, '{"age": 3}') == 1.0
        assert ask(reward, schema, 'Here:\n```json\n{"age": 3}\n```\n') == 1.0
        for wrong in ('{"age": "3"}', "{}", '{"age": 3', "", "age: 3", '{"age": NaN}'):
            assert ask(reward, schema, wrong) == 0.0, wrong
        with pytest.raises(CheckError, match="SchemaError"):
            ask(reward, {"type": "objekt"}, "{}")
    finally:
        reward.close()


def test_a_process_that_dies_is_no_verdict_and_is_replaced():
    reward = Matches(workers=1)
    try:
        assert ask(reward, "a", "a") == 1.0
        reward._idle[0]._process.kill()
        verdict = ask(judged(reward), "a", "a")
        assert verdict.reward is None
        assert ask(reward, "a", "a") == 1.0
    finally:
        reward.close()


def test_answers_are_checked_at_once_and_each_gets_its_own_verdict():
    async def scenario(reward):
        async def one(i):
            return await reward(Prompt(i, (), answer=str(i)), Generated((), (), (), text=str(i - i % 3)))

        return await asyncio.gather(*(one(i) for i in range(30)))

    reward = Matches(workers=2)
    try:
        assert asyncio.run(scenario(reward)) == [float(i % 3 == 0) for i in range(30)]
        assert len(reward._idle) <= 2
    finally:
        reward.close()
