"""Rewards: verdicts where there is one, and no verdict - never a zero - where the verifier fails."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.rl.environments import Generated, Prompt, SingleTurn
from raytron.rl.rewards import Exact, FinalNumber, Tokens, Weighted, judged

PROMPT = Prompt(0, (0,), answer="42")


def said(text: str, *ids: int) -> Generated:
    return Generated(tuple(ids), (0.0,) * len(ids), (0,) * len(ids), text=text)


def worth(reward, answer, prompt=PROMPT):
    return asyncio.run(reward(prompt, answer))


def constant(value):
    async def reward(prompt, answer):
        return value

    return reward


async def failing(prompt, answer):
    raise RuntimeError("cannot be reached")


async def endless(prompt, answer):
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (failing, "failing: RuntimeError: cannot be reached"),
        (endless, "no verdict within 0.05 s"),
        (constant(math.nan), "the reward is nan"),
        (constant(math.inf), "the reward is inf"),
        (constant(None), "TypeError"),
        (Weighted((1.0, constant(1.0)), (0.5, failing)), "cannot be reached"),
    ],
)
def test_a_failed_reward_is_no_verdict(reward, reason):
    async def scenario():
        environment = SingleTurn(judged(reward, timeout_s=0.05))
        await environment.reset(PROMPT)
        return await environment.step(said("42"))

    result = asyncio.run(scenario())
    assert result.reward is None
    assert reason in result.info["error"]


def test_a_verdict_carries_no_error():
    verdict = worth(judged(constant(0)), said(""))
    assert (verdict.reward, verdict.reason) == (0.0, None)


def test_waiting_for_a_turn_is_not_the_verifiers_time():
    async def scenario():
        running, most, gate = 0, 0, asyncio.Event()

        async def reward(prompt, answer):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await gate.wait()
            running -= 1
            return 1.0

        judge = judged(reward, timeout_s=60.0, concurrency=2)
        judging = [asyncio.ensure_future(judge(PROMPT, said(""))) for _ in range(8)]
        while running < 2:
            await asyncio.sleep(0)
        gate.set()
        return most, [verdict.reward for verdict in await asyncio.gather(*judging)]

    most, rewards = asyncio.run(scenario())
    assert most == 2
    assert rewards == [1.0] * 8


def test_one_judge_serves_several_event_loops():
    judge = judged(constant(1.0), concurrency=1)

    async def several():
        return [verdict.reward for verdict in await asyncio.gather(*(judge(PROMPT, said("")) for _ in range(3)))]

    assert asyncio.run(several()) == asyncio.run(several()) == [1.0] * 3


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=5))
def test_a_weighted_sum(parts):
    total = worth(Weighted(*((weight, constant(value)) for weight, value in parts)), said(""))
    assert total == pytest.approx(sum(weight * value for weight, value in parts))


def test_exact():
    assert worth(Exact(), said(" 42\n")) == 1.0
    assert worth(Exact(), said("042")) == 0.0
    assert worth(Exact(str.casefold), said("YES"), Prompt(0, (), answer="yes")) == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "strict", "loose"),
    [
        ("so 6 * 7\n#### 42", "42", 1.0, 1.0),
        ("#### 41\n#### $42.0", "42", 1.0, 1.0),
        ("#### 1,234", "1234", 1.0, 1.0),
        ("#### -5", "-5", 1.0, 1.0),
        ("#### 420", "42", 0.0, 0.0),
        ("#### 41, no: 42", "42", 0.0, 0.0),
        ("it is 42.", "42", 0.0, 1.0),
        ("42 or 43", "42", 0.0, 0.0),
        ("nothing", "42", 0.0, 0.0),
        ("####", "42", 0.0, 0.0),
        ("", "42", 0.0, 0.0),
    ],
)
def test_the_final_number(text, answer, strict, loose):
    prompt = Prompt(0, (), answer=answer)
    assert worth(FinalNumber(), said(text), prompt) == strict
    assert worth(FinalNumber(strict=False), said(text), prompt) == loose


def test_a_reference_that_is_no_number_is_no_verdict():
    assert worth(judged(FinalNumber()), said("#### 3"), Prompt(0, (), answer="three")).reward is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(0, 3), max_size=8))
def test_tokens_right_from_the_start(wanted, got):
    prompt = Prompt(0, (), answer=tuple(wanted))
    dense, exact = (worth(Tokens(dense), said("", *got), prompt) for dense in (True, False))
    right = max(n for n in range(len(wanted) + 1) if got[:n] == wanted[:n])
    assert dense == right / len(wanted)
    assert exact == (got == wanted)
    assert worth(Tokens(), said("", *wanted), prompt) == 1.0
