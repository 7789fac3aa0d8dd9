"""Episodes: an environment and an engine in turn, recorded token for token; n of one prompt are a group.

    reset -> context -> generate -> answer -> step -> observation -> context (longer) -> generate -> ... -> Trajectory

The engine is whatever answers `generate(token_ids, params)`; its errors are the caller's to handle. An environment that
raises or takes too long costs the episode its reward (None, with info["error"]), never a zero: a zero would tell the
policy that what it did was bad.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from raytron.inference.types import SamplingParams
from raytron.rl.environments.base import Generated, Prompt, StepResult, Task, Verdict
from raytron.rl.rewards.base import Overall
from raytron.rl.seeds import seed_of
from raytron.rl.types import Group, Trajectory

__all__ = ["Answer", "Generate", "run_episode", "run_group"]


class Answer(Protocol):
    """What `generate` returns: a `Generated`, or an engine's `Completion`."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    finish_reason: str | None


Generate = Callable[[tuple[int, ...], SamplingParams], Awaitable[Answer]]


class _Failed(Exception):  # noqa: N818 (not an error: an outcome)
    """The episode cannot be judged; why."""


@dataclass
class _Record:
    """The episode so far. budget: tokens it may have in all. start: those before the first answer."""

    budget: int | None
    tokens: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reward: float | None = 0.0
    truncated: bool = False
    info: dict[str, float | str] = field(default_factory=dict)
    turns: int = 0
    start: int = 0

    def room(self, most: int) -> int:
        """Tokens that the next answer may have."""
        return most if self.budget is None else min(most, self.budget - len(self.tokens))

    def see(self, ids: Sequence[int]) -> None:
        self.tokens += ids
        self.chosen += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.versions += [-1] * len(ids)

    def choose(self, context: tuple[int, ...], answer: Generated) -> None:
        assert tuple(self.tokens) == context, "what the engine saw is not what was recorded"
        self.tokens += answer.token_ids
        self.chosen += [True] * len(answer.token_ids)
        self.logprobs += answer.logprobs
        self.versions += answer.versions
        self.turns += 1
        self.truncated = answer.finish_reason == "length"
        if answer.finish_reason not in ("stop", "length"):
            raise _Failed(f"generation ended with {answer.finish_reason!r}")

    def goes_on(self, observation: Sequence[int]) -> bool:
        """Take in an observation if another answer may follow: the last wasn't cut, and the budget has room."""
        if not self.truncated:
            self.truncated = self.budget is not None and len(self.tokens) + len(observation) >= self.budget
            if not self.truncated:
                self.see(observation)
        return not self.truncated

    def credit(self, result: StepResult) -> None:
        self.info |= result.info
        self.reward = None if self.reward is None or result.reward is None else self.reward + float(result.reward)

    async def judge(self, overall: Overall, task: Task, prompt: Prompt) -> None:
        """Have the whole judged; that takes the place of what the environment said."""
        start = self.start
        ids, logprobs, versions = (tuple(x[start:]) for x in (self.tokens, self.logprobs, self.versions))
        reason = "length" if self.truncated else "stop"
        answer = Generated(ids, logprobs, versions, reason, task.decode(ids))
        verdict = await overall(replace(prompt, token_ids=tuple(self.tokens[:start])), answer, self.reward)
        self._settle(verdict)

    def _settle(self, verdict: Verdict) -> None:
        if self.reward is not None:
            self.info["task_reward"] = self.reward
        if verdict.reason is not None:
            self.info["error"] = verdict.reason
        if verdict.reward is not None:
            self.info.pop("error", None)
        self.reward = verdict.reward

    def trajectory(self) -> Trajectory:
        info = {**self.info, "turns": float(self.turns)}
        if self.reward is None:
            info.setdefault("error", "the environment gave no reward")
        return Trajectory(self.tokens, self.chosen, self.logprobs, self.versions, self.reward, self.truncated, info)


async def run_episode(
    generate: Generate,
    task: Task,
    prompt: Prompt,
    sampling: SamplingParams | None = None,
    *,
    seed: int = 0,
    sample: int = 0,
    budget: int | None = None,
    timeout_s: float = 600.0,
    overall: Overall | None = None,
) -> Trajectory:
    """Play one episode.

    Args:
        sampling: how to choose tokens. Its seed, n and max_tokens are set here: the seed from (seed, prompt.index,
            sample, turn), so that the episode depends neither on the engine nor on when it is played; the length from
            the task and the budget.
        budget: tokens of the whole episode, prompt and observations included; None is no limit but the task's.
        timeout_s: for each reset and each step of the environment.
        overall: judges the whole episode when it is over (`raytron.rl.rewards.overall`), instead of the environment.

    Raises ValueError for an answer that cannot be recorded, and what `generate` and `task.environment` raise.
    """
    record, sampling, environment = _Record(budget), sampling or SamplingParams(), task.environment()
    try:
        record.see(await _asked(timeout_s, environment.reset, prompt))
        record.start = len(record.tokens)
        if record.room(1) < 1:
            raise _Failed(f"the prompt has {len(record.tokens)} tokens, which leaves none of the budget of {budget}")
        going = True
        while going:
            context, room = tuple(record.tokens), record.room(task.max_tokens)
            params = _params(task, sampling, room, seed_of(seed, prompt.index, sample, record.turns))
            answer = _generated(await generate(context, params), task, room)
            record.choose(context, answer)
            result = await _asked(timeout_s, environment.step, answer)
            record.credit(result)
            going = not result.done and record.goes_on(result.observation)
        if overall is not None:
            await record.judge(overall, task, prompt)
    except _Failed as failure:
        record.reward, record.info["error"] = None, str(failure)
        if not record.tokens:
            record.see(prompt.token_ids)
    return record.trajectory()


def _params(task: Task, sampling: SamplingParams, room: int, seed: int) -> SamplingParams:
    ends = dict.fromkeys((*sampling.stop_token_ids, *task.eos_token_ids, *task.stop_token_ids))
    return replace(
        sampling,
        n=1,
        seed=seed,
        max_tokens=room,
        min_tokens=min(sampling.min_tokens, room),
        stop=tuple(dict.fromkeys((*sampling.stop, *task.stop))),
        stop_token_ids=tuple(ends),
        ignore_eos=True,  # the task says what ends an answer; a model's files may name others, or none
    )


def _generated(answer: Answer, task: Task, room: int) -> Generated:
    ids, logprobs, versions = (tuple(getattr(answer, name)) for name in ("token_ids", "logprobs", "versions"))
    if not len(ids) == len(logprobs) == len(versions) or len(ids) > room:
        raise ValueError(
            f"an answer has {len(ids)} tokens, {len(logprobs)} log-probabilities and {len(versions)} versions; it must"
            f" have as many of each, and at most {room}"
        )
    return Generated(ids, logprobs, versions, answer.finish_reason, task.decode(ids))


async def _asked(timeout_s: float, ask: Callable[..., Awaitable[Any]], what: object) -> Any:
    """The environment's reply; whatever goes wrong there is `_Failed`."""
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await ask(what)
    except Exception as error:
        if limit.expired():
            raise _Failed(f"the environment's {ask.__name__} took more than {timeout_s:g} s") from error
        raise _Failed(f"{type(error).__name__}: {error}") from error


async def run_group(
    generate: Generate,
    task: Task,
    prompt: Prompt,
    sampling: SamplingParams | None = None,
    *,
    samples: int,
    **options: Any,
) -> Group:
    """Play `samples` episodes of one prompt at once; arguments and errors as in `run_episode`."""
    episodes = [
        asyncio.ensure_future(run_episode(generate, task, prompt, sampling, sample=sample, **options))
        for sample in range(samples)
    ]
    try:
        return Group(prompt.index, tuple(await asyncio.gather(*episodes)))
    finally:
        for episode in episodes:  # of a group that will not be whole
            episode.cancel()
