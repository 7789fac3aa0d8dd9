"""Higher or lower: find a secret number in a few guesses. Several turns, and only the last decides.

    <bos>   4   higher   6   lower   5     (guesses are the model's, hints the environment's)

With 8 numbers and 3 guesses halving finds 7 of them: 0.875 is the best there is. Any other token than a number is a
lost guess. A guess is one token, so every token ends an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytron.rl.environments import Generated, MultiTurn, Prompt, StepResult
from raytron.rl.tasks.base import WordTask, require

__all__ = ["HigherLower"]


@dataclass(frozen=True)
class HigherLower(WordTask):
    """Guess the number."""

    numbers: int = 8
    """The secret lies between 1 and this."""
    turns: int = 3
    """Guesses."""

    max_tokens = 1
    held_out = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.numbers >= 2, f"numbers is {self.numbers}; it must be at least 2")
        require(self.turns >= 1, f"turns is {self.turns}; it must be at least 1")

    @property
    def words(self) -> tuple[str, ...]:
        """The hints ("?" after a lost guess) and the numbers."""
        return ("higher", "lower", "?", *map(str, range(1, self.numbers + 1)))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every token."""
        return tuple(range(self.vocab_size))

    def draw(self, index: int, stream: str) -> Prompt:
        """Always <bos>; the answer is the secret."""
        ids = self.vocabulary.ids("<bos>")
        return Prompt(index, ids, self.chance(index, stream).randint(1, self.numbers), self.decode(ids))

    async def hint(self, prompt: Prompt, answers: Sequence[Generated]) -> StepResult:
        """What follows a guess."""
        guess = self.decode(answers[-1].token_ids)
        if not guess.isdecimal():
            return StepResult(self.vocabulary.ids("?"), done=False)
        if int(guess) == prompt.answer:
            return StepResult(reward=1.0)
        return StepResult(self.vocabulary.ids("higher" if prompt.answer > int(guess) else "lower"), done=False)

    def environment(self) -> MultiTurn:
        """For one episode."""
        return MultiTurn(self.hint, self.turns)
