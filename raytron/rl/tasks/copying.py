"""Write back digits: one (echo), several (copy), in reverse order. The smallest tasks that RL can fail at.

    <bos> 3 1 4 1 =    ->    3 1 4 1 <eos>

The dense reward is the share of the wanted tokens, <eos> included, that the answer begins with: each further right
token pays at once, so that a model which knows nothing finds the way (the prefix reward of verl's digit completion).
The end token must be among them: a reward that is content with the digits leaves answers that never end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from raytron.rl.environments import Judge, Prompt, SingleTurn
from raytron.rl.rewards import Tokens, judged
from raytron.rl.tasks.base import WordTask, require

__all__ = ["Copy", "EchoDigit", "Reverse"]


@dataclass(frozen=True)
class Copy(WordTask):
    """Write the digits back."""

    length: int = 4
    """Digits of a prompt."""
    digits: int = 10
    """Different digits there are."""
    dense: bool = True
    """Reward the part that is right; else 1 for all of it and 0 for less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.length >= 1, f"length is {self.length}; it must be at least 1")
        require(self.digits >= 2, f"digits is {self.digits}; it must be at least 2")

    @property
    def words(self) -> tuple[str, ...]:
        """= and the digits."""
        return ("=", *map(str, range(self.digits)))

    @property
    def max_tokens(self) -> int:
        """What the right answer has."""
        return self.length + 1

    def draw(self, index: int, stream: str) -> Prompt:
        """A prompt of random digits; its answer: the wanted tokens."""
        return self._asking(index, self.chance(index, stream).choices(range(self.digits), k=self.length))

    def evaluation(self) -> Sequence[Prompt]:
        """All there are if they are few, else some of a stream of their own."""
        if self.digits**self.length > self.held_out:
            return super().evaluation()
        every = itertools.product(range(self.digits), repeat=self.length)
        return [self._asking(index, digits) for index, digits in enumerate(every)]

    def _asking(self, index: int, digits: Sequence[int]) -> Prompt:
        ids = self.vocabulary.ids("<bos>", *digits, "=")
        wanted = self.vocabulary.ids(*self.wanted(digits), "<eos>")
        return Prompt(index, ids, wanted, self.decode(ids), (wanted,))

    def wanted(self, digits: Sequence[int]) -> Sequence[int]:
        """What to write for `digits`."""
        return digits

    @cached_property
    def _judge(self) -> Judge:
        return judged(Tokens(self.dense))

    def environment(self) -> SingleTurn:
        """For one episode."""
        return SingleTurn(self._judge)


@dataclass(frozen=True)
class EchoDigit(Copy):
    """Write one digit back."""

    length: int = 1


@dataclass(frozen=True)
class Reverse(Copy):
    """Write the digits back from the last to the first."""

    def wanted(self, digits: Sequence[int]) -> Sequence[int]:
        """In reverse."""
        return digits[::-1]
