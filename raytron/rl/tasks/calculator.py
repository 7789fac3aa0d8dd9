"""Arithmetic with a calculator: write the sum as a call, read the result, write it as the answer.

    <bos> 7 * 8 =   7 * 8 <call>   5 6   5 6 <eos>     (the call and the answer are the model's, the result the tool's)

A call that is no arithmetic gives ?. Half of the dense reward is for the first call, half for the answer, each the
share of the wanted tokens it begins with; one answer alone earns the better of the two, so that a call pays before it
is whole. Without it an answer is worth 1 or 0, whether a tool was called or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        return ("=", "<call>", "?", "+", "-", "*", *"0123456789")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """A call ends an answer."""
        return self.vocabulary.ids("<call>")

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
        wanted = (self.vocabulary.ids(*words, "<call>"), (*self.result(words), *self.eos_token_ids))
        return Prompt(index, ids, wanted, self.decode(ids))

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
        called = prefix_share(last, call) / 2 if self.dense and len(answers) == 1 else 0.0
        if last[-1:] == call[-1:]:
            return StepResult(self.result(self.vocabulary.texts(last[:-1])), called, done=False)
        right = prefix_share(last, value) / 2 if self.dense else float(last == value)
        return StepResult(reward=max(called, right))

    def environment(self) -> MultiTurn:
        """For one episode."""
        return MultiTurn(self.reply, self.turns)


def _numbers(words: Sequence[str]) -> list[str]:
    """Digits that follow each other are one number."""
    joined: list[str] = []
    for word in words:
        if word.isdecimal() and joined and joined[-1].isdecimal():
            joined[-1] += word
        else:
            joined.append(word)
    return joined
