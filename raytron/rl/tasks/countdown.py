"""Countdown: reach the target with all of the numbers, each used once.

<bos> 3 7 5 = 16 :    ->    ( 3 * 7 ) - 5 <eos>
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from raytron.rl.environments import Generated, Judge, Prompt, SingleTurn
from raytron.rl.rewards import judged
from raytron.rl.tasks.arithmetic import apply, evaluate
from raytron.rl.tasks.base import WordTask, require

__all__ = ["Countdown", "Problem"]


@dataclass(frozen=True)
class Problem:
    """Numbers, the target, and one way there, in words."""

    numbers: tuple[int, ...]
    target: int
    solution: tuple[str, ...]


@dataclass(frozen=True)
class Countdown(WordTask):
    """Write an expression with given numbers and a given value. Each integer is one token."""

    numbers: int = 3
    """Numbers of a prompt."""
    largest: int = 9
    """Of the numbers, from 1."""
    largest_target: int = 50
    """Targets lie between 0 and this."""
    operators: str = "+-*"
    """What solutions are made of; / too is understood where it is among them."""
    form_reward: float = 0.1
    """For an expression that uses the numbers and has another value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.numbers >= 2, f"numbers is {self.numbers}; it must be at least 2")
        require(1 <= self.largest <= self.largest_target, "largest must lie between 1 and largest_target")
        require(
            bool(self.operators) and set(self.operators) <= set("+-*/"),
            f"operators is {self.operators!r}; it must be some of + - * /",
        )

    @property
    def words(self) -> tuple[str, ...]:
        """Marks, operators, integers."""
        return ("=", ":", "(", ")", *dict.fromkeys(self.operators), *map(str, range(self.largest_target + 1)))

    @property
    def max_tokens(self) -> int:
        """Numbers, the operators and parentheses between them, <eos>, and some to spare."""
        return 4 * self.numbers

    def draw(self, index: int, stream: str) -> Prompt:
        """A problem that has a solution."""
        random = self.chance(index, stream)
        problem = None
        while problem is None:
            numbers = [random.randint(1, self.largest) for _ in range(self.numbers)]
            problem = self._reached(
                numbers, [random.choice(self.operators) for _ in numbers[1:]], random.random() < 0.5
            )
        shown = random.sample(problem.numbers, len(problem.numbers))
        ids = self.vocabulary.ids("<bos>", *shown, "=", problem.target, ":")
        solution = self.vocabulary.ids(*problem.solution, "<eos>")
        return Prompt(index, ids, problem, self.decode(ids), (solution,))

    def _reached(self, numbers: Sequence[int], operators: Sequence[str], mirrored: bool) -> Problem | None:
        """Where the operators lead, one after the other; None if that is no target. mirrored: the first part last."""
        value, words = Fraction(numbers[0]), [str(numbers[0])]
        for operator, number in zip(operators, numbers[1:], strict=True):
            part = words if len(words) == 1 else ["(", *words, ")"]
            if mirrored:
                if operator == "/" and value == 0:
                    return None
                value, words = apply(operator, Fraction(number), value), [str(number), operator, *part]
            else:
                value, words = apply(operator, value, Fraction(number)), [*part, operator, str(number)]
        fits = value.denominator == 1 and 0 <= value <= self.largest_target
        return Problem(tuple(numbers), int(value), tuple(words)) if fits else None

    async def score(self, prompt: Prompt, answer: Generated) -> float:
        """1 for the target, `form_reward` for another value of the right numbers, else 0."""
        words = self.vocabulary.texts(answer.token_ids)
        if not words or words[-1] != "<eos>":
            return 0.0
        used = Counter(int(word) for word in words if word.isdecimal())
        try:
            value = evaluate(words[:-1])
        except ValueError:
            return 0.0
        if used != Counter(prompt.answer.numbers):
            return 0.0
        return 1.0 if value == prompt.answer.target else self.form_reward

    @cached_property
    def _judge(self) -> Judge:
        return judged(self.score)

    def environment(self) -> SingleTurn:
        """For one episode."""
        return SingleTurn(self._judge)
