"""Environments: one answer, several answers with a partner between them, answers that call tools.

A partner is a function of the prompt and all answers so far, so that what it says next depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from raytron.rl.environments.base import Generated, Judge, Prompt, StepResult

__all__ = ["Call", "MultiTurn", "Partner", "SingleTurn", "with_tools"]

Call = Callable[[Generated], Awaitable[tuple[int, ...] | None]]
"""The tokens that follow an answer which calls a tool; None for an answer that calls none."""


class SingleTurn:
    """One answer, and it is judged."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    async def reset(self, prompt: Prompt) -> tuple[int, ...]:
        self._prompt = prompt
        return prompt.token_ids

    async def step(self, answer: Generated) -> StepResult:
        return await _judgement(self._judge, self._prompt, answer)


class Partner(Protocol):
    """The other side of a conversation."""

    async def __call__(self, prompt: Prompt, answers: Sequence[Generated]) -> StepResult:
        """What follows the last of `answers`."""


class MultiTurn:
    """Answers in turn with a partner, at most `turns` of them."""

    def __init__(self, partner: Partner, turns: int) -> None:
        if turns < 1:
            raise ValueError(f"turns is {turns}; it must be at least 1")
        self._partner, self._turns = partner, turns

    async def reset(self, prompt: Prompt) -> tuple[int, ...]:
        self._prompt, self._answers = prompt, []
        return prompt.token_ids

    async def step(self, answer: Generated) -> StepResult:
        self._answers.append(answer)
        result = await self._partner(self._prompt, tuple(self._answers))
        return result if len(self._answers) < self._turns else replace(result, done=True)


def with_tools(call: Call, judge: Judge) -> Partner:
    """A partner that carries out calls; the first answer without one is judged."""

    async def partner(prompt: Prompt, answers: Sequence[Generated]) -> StepResult:
        observation = await call(answers[-1])
        if observation is None:
            return await _judgement(judge, prompt, answers[-1])
        return StepResult(observation, done=False)

    return partner


async def _judgement(judge: Judge, prompt: Prompt, answer: Generated) -> StepResult:
    verdict = await judge(prompt, answer)
    return StepResult(reward=verdict.reward, info={} if verdict.reason is None else {"error": verdict.reason})
