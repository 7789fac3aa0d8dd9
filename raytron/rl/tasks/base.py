"""What the tasks with a small vocabulary share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from raytron.config import Typed
from raytron.rl.environments.base import Prompt
from raytron.rl.seeds import chance
from raytron.rl.tasks.vocabulary import Vocabulary

__all__ = ["Named", "WordTask", "require"]


def require(holds: bool, message: str) -> None:
    """ValueError with `message` unless it holds."""
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True)
class Named(Typed):
    """A task is its own configuration: its fields are what can be set, and all that is sent to another process."""

    seed: int = 0
    """Fixes the prompts."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (type(self), {field.name: getattr(self, field.name) for field in fields(self)})


def _make(kind: type, values: dict[str, Any]) -> Any:
    return kind(**values)


@dataclass(frozen=True)
class WordTask(Named):
    """A task whose tokens are words. A kind of it defines `words`, `max_tokens`, `draw` and `environment`."""

    stop = ()
    stop_token_ids = ()
    eos_token_ids = (1,)
    words = ()
    held_out = 64
    """Prompts of evaluation."""

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Its tokens."""
        return Vocabulary(self.words)

    @property
    def vocab_size(self) -> int:
        """Ids there are."""
        return len(self.vocabulary)

    def draw(self, index: int, stream: str) -> Prompt:
        """Prompt `index` of one of the streams "train" and "evaluation"."""
        raise NotImplementedError

    def prompt(self, index: int) -> Prompt:
        """Prompt `index` of the run, drawn at random by (seed, index)."""
        return self.draw(index, "train")

    def evaluation(self) -> Sequence[Prompt]:
        """Prompts of a stream of their own; in a small task some may be those of training too."""
        return [self.draw(index, "evaluation") for index in range(self.held_out)]

    def chance(self, index: int, stream: str) -> Any:
        """The generator of a prompt (random.Random)."""
        return chance(self.seed, stream, index)

    def decode(self, token_ids: Sequence[int], special: bool = False) -> str:
        """Words between spaces; special: with <bos> and <eos>."""
        return self.vocabulary.decode(token_ids, special)

    def save_tokenizer(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files."""
        self.vocabulary.save(directory)
