"""Arithmetic with a calculator: write the sum as a call, read the result, write it as the answer.

    <bos> 7 * 8 =     7 * 8 =   5 6   5 6 <eos>     (the call and the answer are the model's, the result the tool's)

What ends in = is a call; one that is no arithmetic gives ?. Half of the dense reward is for the first answer: the share
of the wanted call's tokens that stand in their places (not only those before the first wrong one, or = would be found
last). Half is for the last answer: the share of the result that it begins with, but all or nothing unless it was asked
for, since a model that is paid for the first digit of a guess is slow to ask. Without the dense reward an answer is
worth 1 or 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq

from raytron.rl.environments import Generated, MultiTurn, Prompt, StepResult
from raytron.rl.rewards.exact import prefix_share
from raytron.rl.tasks.arithmetic import evaluate, written
from raytron.rl.tasks.base import WordTask, require

__all__ = ["Calculator"]


@dataclass(frozen=True)
class Calculator(WordTask):
    """Compute with a tool."""

    terms: int = 2
    """Numbers in a sum."""
    largest: int = 9
    """Of them, from 0."""
    operators: str = "+-*"
    turns: int = 3
    """Answers, calls included."""
    dense: bool = True
    """Reward right parts; else 1 for a right answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.terms >= 2, f"terms is {self.terms}; it must be at least 2")
        require(self.turns >= 2, f"turns is {self.turns}; a call and an answer are 2")
        require(self.largest >= 1, f"largest is {self.largest}; it must be at least 1")
        require(
            bool(self.operators) and set(self.operators) <= set("+-*"),
            f"operators is {self.operators!r}; it must be some of + - *",
        )

    @property
    def words(self) -> tuple[str, ...]:
        """Marks, operators, digits."""
        return ("=", "?", "+", "-", "*", *"0123456789")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """A call ends an answer."""
        return self.vocabulary.ids("=")

    @property
    def max_tokens(self) -> int:
        """What a call or the longest result has."""
        return self.terms * (len(str(self.largest)) + 1) + 1

    def draw(self, index: int, stream: str) -> Prompt:
        """The answer: the wanted call and result, as tokens."""
        random = self.chance(index, stream)
        words = list(str(random.randint(0, self.largest)))
        for _ in range(self.terms - 1):
            words += [random.choice(self.operators), *str(random.randint(0, self.largest))]
        ids = self.vocabulary.ids("<bos>", *words, "=")
        wanted = (self.vocabulary.ids(*words, "="), (*self.result(words), *self.eos_token_ids))
        return Prompt(index, ids, wanted, self.decode(ids), wanted)

    def result(self, words: Sequence[str]) -> tuple[int, ...]:
        """What the tool says of a sum, one word a digit."""
        try:
            return self.vocabulary.ids(*written(evaluate(_numbers(words))))
        except ValueError:
            return self.vocabulary.ids("?")

    async def reply(self, prompt: Prompt, answers: Sequence[Generated]) -> StepResult:
        """A call's result, or what an answer is worth."""
        call, value = prompt.answer
        last = answers[-1].token_ids
        called = _in_place(last, call) if self.dense and len(answers) == 1 else 0.0
        if last[-1:] == call[-1:]:
            return StepResult(self.result(self.vocabulary.texts(last[:-1])), called / 2, done=False)
        asked = any(answer.token_ids == call for answer in answers[:-1])
        right = prefix_share(last, value) if self.dense and asked else float(last == value)
        return StepResult(reward=max(called, right) / 2 if self.dense else right)

    def environment(self) -> MultiTurn:
        """For one episode."""
        return MultiTurn(self.reply, self.turns)


def _in_place(tokens: Sequence[int], wanted: Sequence[int]) -> float:
    """The share of `wanted` that stands where it should."""
    return sum(map(eq, tokens, wanted)) / len(wanted)


def _numbers(words: Sequence[str]) -> list[str]:
    """Digits that follow each other are one number."""
    joined: list[str] = []
    for word in words:
        if word.isdecimal() and joined and joined[-1].isdecimal():
            joined[-1] += word
        else:
            joined.append(word)
    return joined
