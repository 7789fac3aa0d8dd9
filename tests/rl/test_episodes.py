"""Episodes: what is recorded is what the engine saw and chose; budgets, seeds; failures are never zeros."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.inference.types import Completion, SamplingParams
from raytron.rl.environments import Generated, MultiTurn, Prompt, StepResult
from raytron.rl.episodes import run_episode, run_group
from raytron.rl.seeds import chance, seed_of
from tests.rl.players import Engine

EOS, PROMPT = 1, Prompt(index=7, token_ids=(0, 5, 6))


@dataclass(frozen=True)
class Talk:
    """A task whose partner says given observations, then ends; tokens are numbers, answers end with EOS."""

    observations: tuple[tuple[int, ...], ...] = ()
    rewards: tuple[float | None, ...] = (1.0,)
    max_tokens: int = 8
    eos_token_ids = (EOS,)
    stop_token_ids = (2,)
    stop = ()
    vocab_size = 100

    async def partner(self, prompt, answers) -> StepResult:
        turn = len(answers) - 1
        reward = self.rewards[turn] if turn < len(self.rewards) else 0.0
        if turn < len(self.observations):
            return StepResult(self.observations[turn], reward, done=False, info={f"turn {turn}": 1.0})
        return StepResult(reward=reward, info={f"turn {turn}": 1.0})

    def environment(self) -> MultiTurn:
        return MultiTurn(self.partner, turns=100)

    def decode(self, token_ids, special=False) -> str:
        return " ".join(map(str, token_ids))


def episode(engine, task, **options):
    return asyncio.run(run_episode(engine, task, PROMPT, **options))


def saying(*answers):
    """A player that gives these answers, one a turn."""
    left = iter(answers)
    return lambda context: next(left)


keys = st.integers() | st.text(max_size=5)
tokens = st.lists(st.integers(3, 99), max_size=6).map(tuple)
answers = st.tuples(tokens, st.booleans()).map(lambda a: (*a[0], EOS) if a[1] or not a[0] else a[0])
talks = st.builds(
    Talk,
    observations=st.lists(tokens, max_size=4).map(tuple),
    rewards=st.lists(st.floats(-2, 2), max_size=5).map(tuple),
    max_tokens=st.integers(1, 8),
)


@settings(deadline=None)
@given(talks, st.lists(answers, min_size=5, max_size=5), st.none() | st.integers(4, 40), st.integers(0, 2**40))
def test_the_record_is_what_the_engine_saw_and_chose(task, said, budget, seed):
    engine = Engine(saying(*said))
    got = episode(engine, task, budget=budget, seed=seed)
    contexts = [context for context, _ in engine.asked]
    recorded = tuple(got.tokens.tolist())

    assert contexts[0] == PROMPT.token_ids
    expected_mask = np.zeros(len(recorded), bool)
    for context, answer in zip(contexts, engine.answers, strict=True):
        stop = len(context) + len(answer.token_ids)
        assert recorded[: len(context)] == context
        assert recorded[len(context) : stop] == answer.token_ids
        assert got.logprobs[len(context) : stop].tolist() == list(answer.logprobs)
        assert got.versions[len(context) : stop].tolist() == list(answer.versions)
        expected_mask[len(context) : stop] = True
    assert (got.chosen == expected_mask).all()
    assert (got.logprobs[~got.chosen] == 0).all()
    assert (got.versions[~got.chosen] == -1).all()

    for (before, answer, observation), after in zip(
        zip(contexts, engine.answers, task.observations, strict=False), contexts[1:], strict=False
    ):
        assert after == (*before, *answer.token_ids, *observation)
    last = engine.answers[-1]
    assert recorded == (*contexts[-1], *last.token_ids), "something was appended that nobody chose or said"

    assert got.length == sum(len(answer.token_ids) for answer in engine.answers)
    assert budget is None or len(recorded) <= budget
    for context, asked in engine.asked:
        assert asked.n == 1
        assert asked.max_tokens == (task.max_tokens if budget is None else min(task.max_tokens, budget - len(context)))
        assert {EOS, 2} <= set(asked.stop_token_ids)
        assert asked.ignore_eos
    assert got.truncated == (last.finish_reason == "length" or len(engine.answers) <= len(task.observations))
    assert got.reward == pytest.approx(sum(task.rewards[: len(engine.answers)]))
    assert got.info["turns"] == len(engine.answers)


@settings(deadline=None)
@given(talks, st.integers(0, 2**40), st.integers(0, 63))
def test_seeds_are_a_function_of_run_prompt_sample_and_turn(task, seed, sample):
    def seeds(**options):
        engine = Engine(lambda context: (9, EOS))
        episode(engine, task, **options)
        return [params.seed for _, params in engine.asked]

    mine = seeds(seed=seed, sample=sample)
    assert mine == [seed_of(seed, PROMPT.index, sample, turn) for turn in range(len(mine))]
    assert mine == seeds(seed=seed, sample=sample)
    others = seeds(seed=seed + 1, sample=sample) + seeds(seed=seed, sample=sample + 1)
    assert len({*mine, *others}) == len(mine) + len(others)


@given(st.lists(keys, max_size=3), st.lists(keys, max_size=3))
def test_seeds_fit_every_engine_and_differ(a, b):
    assert 0 <= seed_of(*a) < 2**63
    assert (seed_of(*a) == seed_of(*b)) == (a == b)
    assert chance(*a).random() == chance(*a).random()


def test_a_seed_is_the_same_in_every_release():
    assert seed_of(1234, "train", 5) == seed_of(np.int64(1234), "train", np.int32(5)) == 6105299910558237384


def test_sampling_keeps_what_the_caller_asked_for():
    engine = Engine(lambda context: (EOS,))
    sampling = SamplingParams(n=4, temperature=0.7, top_k=5, min_tokens=12, stop=("x",), stop_token_ids=(50,), seed=3)
    sampling = replace(sampling, max_tokens=99)
    episode(engine, Talk(), sampling=sampling)
    params = engine.asked[0][1]
    assert (params.temperature, params.top_k, params.stop) == (0.7, 5, ("x",))
    assert params.stop_token_ids == (50, EOS, 2)
    assert (params.max_tokens, params.min_tokens, params.n) == (8, 8, 1)


def test_an_engines_completion_is_an_answer():
    async def generate(token_ids, params):
        return Completion(0, token_ids=[9, EOS], logprobs=[-1.0, -2.0], versions=[3, 4], finish_reason="stop")

    got = asyncio.run(run_episode(generate, Talk(), PROMPT))
    assert got.tokens.tolist() == [0, 5, 6, 9, EOS]
    assert got.version == 3


class Broken:
    """An environment that fails at a given place in a given way."""

    def __init__(self, where: str, error: Exception | None) -> None:
        self.where, self.error = where, error

    async def fail(self, where: str) -> None:
        if where == self.where:
            if self.error is None:
                await asyncio.Event().wait()
            raise self.error

    async def reset(self, prompt):
        await self.fail("reset")
        return prompt.token_ids

    async def step(self, answer):
        await self.fail("step")
        return StepResult()


@pytest.mark.parametrize("where", ["reset", "step"])
@pytest.mark.parametrize("error", [RuntimeError("the disk is full"), TimeoutError("the game server"), None])
def test_a_failed_environment_is_no_reward(where, error, monkeypatch):
    monkeypatch.setattr(Talk, "environment", lambda task: Broken(where, error))
    got = episode(Engine(lambda context: (9, EOS)), Talk(), timeout_s=0.05)
    assert got.reward is None
    assert (str(error) if error else f"{where} took more than 0.05 s") in got.info["error"]
    assert got.length == (2 if where == "step" else 0)
    assert got.tokens.tolist()[:3] == list(PROMPT.token_ids)


def test_an_environment_that_cannot_be_made_stops_the_run(monkeypatch):
    """That is the task's configuration, and every episode's fate; what may pass belongs into `reset`."""

    def fail(task):
        raise ValueError("no such game")

    monkeypatch.setattr(Talk, "environment", fail)
    with pytest.raises(ValueError, match="no such game"):
        episode(Engine(lambda context: (EOS,)), Talk())


def test_one_unjudged_turn_leaves_the_episode_unjudged():
    got = episode(Engine(lambda context: (9, EOS)), Talk(observations=((4,), (4,)), rewards=(1.0, None, 1.0)))
    assert got.reward is None
    assert got.info["error"]
    assert got.info["turns"] == 3


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_an_answer_that_is_none_is_no_reward(reason):
    async def generate(token_ids, params):
        return Generated((9,), (-1.0,), (0,), reason)

    got = asyncio.run(run_episode(generate, Talk(), PROMPT))
    assert got.reward is None
    assert repr(reason) in got.info["error"]


def test_a_prompt_without_room_is_no_reward_and_asks_no_engine():
    engine = Engine(lambda context: (EOS,))
    got = episode(engine, Talk(), budget=3)
    assert got.reward is None
    assert "budget of 3" in got.info["error"]
    assert not engine.asked


def test_an_engines_error_is_the_callers():
    async def generate(token_ids, params):
        raise ConnectionError("the engine is gone")

    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(run_episode(generate, Talk(), PROMPT))


@pytest.mark.parametrize(
    "answer",
    [Generated((9, 9), (0.0,), (0, 0)), Generated((9,), (0.0,), ()), Generated((9,) * 9, (0.0,) * 9, (0,) * 9)],
)
def test_an_answer_that_cannot_be_recorded_is_an_error(answer):
    async def generate(token_ids, params):
        return answer

    with pytest.raises(ValueError, match="log-probabilities"):
        asyncio.run(run_episode(generate, Talk(), PROMPT))


def test_a_groups_episodes_run_at_once_and_keep_their_order():
    async def scenario():
        waiting, everybody = [], asyncio.Event()

        async def generate(token_ids, params):
            waiting.append(params.seed)
            if len(waiting) == 4:
                everybody.set()
            await everybody.wait()
            return Generated((9, EOS), (-1.0, -1.0), (0, 0))

        return await run_group(generate, Talk(), PROMPT, samples=4, seed=3), waiting

    group, seeds = asyncio.run(scenario())
    assert group.index == PROMPT.index
    assert [t.reward for t in group.trajectories] == [1.0] * 4
    assert seeds == [seed_of(3, PROMPT.index, sample, 0) for sample in range(4)]


def test_a_group_that_cannot_be_whole_stops():
    async def scenario():
        stopped, first = [], iter([True])

        async def generate(token_ids, params):
            if next(first, False):
                raise ConnectionError("the engine is gone")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                stopped.append(params.seed)
                raise

        with pytest.raises(ConnectionError):
            await run_group(generate, Talk(), PROMPT, samples=3)
        await asyncio.sleep(0)
        return stopped

    assert len(asyncio.run(scenario())) == 2


def test_contexts_only_grow():
    engine = Engine(lambda context: (9, EOS))
    episode(engine, Talk(observations=((3, 4), (), (5,))))
    for (before, _), (after, _) in pairwise(engine.asked):
        assert after[: len(before)] == before
