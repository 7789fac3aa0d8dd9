"""What an episode is made of: prompts, answers, the environment that takes them, the task that names it all.

    reset(prompt) -> tokens    then, as long as it isn't done:    step(answer) -> observation tokens, reward, done

Everything is token ids. An episode's context only ever grows at its end: what the engine chose is followed by the
observation's ids, and neither is decoded and encoded again, since that need not give the same ids (text is for judging
and for people). Neither Ray nor torch here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Environment", "Generated", "Judge", "Prompt", "StepResult", "Task", "Verdict"]


@dataclass(frozen=True)
class Prompt:
    """The start of an episode.

    index: its place in the run's order of prompts. token_ids: what the model is given. answer: what the task's own
    judge compares with (a text, tokens, tests, ...). text: of the prompt, where the judge or a person reads it.
    solution: a right answer's tokens, end token included, for each turn, where the task knows them: what a warm start
    learns (`raytron.rl.demonstrations`). question: what is asked, without the policy's chat template around it, where
    `text` has one.
    """

    index: int
    token_ids: tuple[int, ...]
    answer: Any = None
    text: str | None = None
    solution: tuple[tuple[int, ...], ...] | None = None
    question: str | None = None

    @property
    def asked(self) -> str:
        """The question as another model should read it."""
        return (self.text or "") if self.question is None else self.question


@dataclass(frozen=True)
class Generated:
    """What an engine answered: token_ids, logprobs and versions (of the weights) of one length, and why it ended.

    finish_reason: "stop" when the model ended it (its end token is then the last), "length" when a limit did, else
    ("abort", "error") it is no answer. text: of the tokens without special ones; `run_episode` fills it in by the
    task's own `decode`, so that what is judged doesn't depend on the engine.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish_reason: str | None = "stop"
    text: str | None = None


@dataclass(frozen=True)
class StepResult:
    """What an answer led to.

    observation: tokens that follow it in the context, chosen by nobody and so masked from loss and length; unused once
    `done`. reward: added to the episode's; None when it could not be judged, which leaves the episode out of training.
    info: numbers and texts for logs, "error" among them where the reward is None.
    """

    observation: tuple[int, ...] = ()
    reward: float | None = 0.0
    done: bool = True
    info: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A reward, or None and the reason why there is none."""

    reward: float | None
    reason: str | None = None


class Judge(Protocol):
    """A reward that cannot raise: see `raytron.rl.rewards.judged`."""

    async def __call__(self, prompt: Prompt, answer: Generated) -> Verdict: ...


class Environment(Protocol):
    """One episode's other side. Used for one episode and by one coroutine; what it raises makes the reward None."""

    async def reset(self, prompt: Prompt) -> tuple[int, ...]:
        """Begin; the tokens the episode starts with."""

    async def step(self, answer: Generated) -> StepResult:
        """Take the model's answer to all tokens so far. One that was cut ("length") is the last in any case."""


class Task(Protocol):
    """What a recipe names: prompts in a fixed order, an environment for each episode, and facts about the tokens.

    eos_token_ids, stop_token_ids: tokens that end an answer; stop: texts that do. max_tokens: of one answer.
    """

    eos_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    max_tokens: int
    vocab_size: int

    def prompt(self, index: int) -> Prompt:
        """Prompt `index` (0, 1, ... without end) of the run: a pure function of the task's fields and `index`."""

    def evaluation(self) -> Sequence[Prompt]:
        """The prompts that evaluation uses, always the same."""

    def environment(self) -> Environment:
        """For one episode."""

    def decode(self, token_ids: Sequence[int], special: bool = False) -> str:
        """Text of tokens; special: with the special ones."""

    def save_tokenizer(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files, such that a model saved in `directory` can be read by transformers."""
