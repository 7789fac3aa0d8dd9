"""What HTTP needs of engines, and no more: the boundary between `server` and whatever runs the models.

`server` is written against `Backend` alone; `LocalBackend` has its engines in this process, the Ray Serve application
(`app`) has them in replicas. Requests cross as token ids, so text is handled on one side only.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from raytron.inference import EngineFailed, EngineLoop, Output, Request, Stats
from raytron.inference.types import PauseMode

__all__ = ["Backend", "Interrupted", "LocalBackend", "ModelCard"]


class Interrupted(EngineFailed):
    """An engine was lost in the middle of an answer; another one may give it, from the start."""


@dataclass(frozen=True)
class ModelCard:
    """A model that can be asked.

    id: its name in requests. path: the Hugging Face directory that its tokenizer and chat template are read from.
    max_model_len: tokens of prompt and output together. version: of the weights, as far as is known here; the tokens of
    an answer carry their own. created: Unix seconds.
    """

    id: str
    path: str
    max_model_len: int
    version: int = 0
    created: int = field(default_factory=lambda: int(time.time()))


class Backend(Protocol):
    """Models by name. Calls with a name that `models` does not have raise KeyError."""

    def models(self) -> Mapping[str, ModelCard]:
        """What is served now. Cheap: asked for every request."""

    def generate(self, model: str, request: Request) -> AsyncGenerator[list[Output], None]:
        """The outputs of `request` as they come, at least one a list; closing it early (`aclose`) aborts the request.

        Raises, when it is first advanced: ValueError for a request that can't be answered, Overloaded when the queue
        is full, EngineFailed when no engine can answer; the last at any later time too, as Interrupted where asking
        again makes sense.
        """

    async def update_weights(self, model: str, path: str, mode: PauseMode = "keep", version: int | None = None) -> int:
        """Load a Hugging Face directory into every engine of the model; its new version.

        Raises ValueError for a path without weights and WeightUpdateError for weights that do not fit.
        """

    async def stats(self, model: str) -> Sequence[Stats]:
        """Of each engine of the model; none when it is scaled to zero."""

    def problems(self) -> Mapping[str, str]:
        """Models that can't answer, and why; what /health tells. Cheap. Being scaled to zero is no problem."""


class LocalBackend:
    """Engines in this process: for tests, a laptop, or one machine without Ray.

    Args:
        engines: name -> (its loop, the Hugging Face directory of its tokenizer).
    """

    def __init__(self, engines: Mapping[str, tuple[EngineLoop, str]]) -> None:
        self._loops = {name: loop for name, (loop, _) in engines.items()}
        self._cards = {name: ModelCard(name, path, loop.max_model_len) for name, (loop, path) in engines.items()}

    def models(self) -> Mapping[str, ModelCard]:
        """What is served now."""
        return {name: replace(card, version=self._loops[name].version) for name, card in self._cards.items()}

    def generate(self, model: str, request: Request) -> AsyncGenerator[list[Output], None]:
        """See `Backend`."""
        return self._loops[model].generate(request)

    async def update_weights(self, model: str, path: str, mode: PauseMode = "keep", version: int | None = None) -> int:
        """See `Backend`."""
        return await self._loops[model].update_weights(path, mode, version)

    async def stats(self, model: str) -> Sequence[Stats]:
        """Of the one engine."""
        return [await self._loops[model].stats()]

    def problems(self) -> Mapping[str, str]:
        """Engines that died, are stale or are being drained."""
        return {name: loop.health for name, loop in self._loops.items() if loop.health != "ready"}

    async def drain(self) -> None:
        """Take nothing new and return when every request is answered."""
        for loop in self._loops.values():
            await loop.drain()

    def close(self) -> None:
        """End the engines."""
        for loop in self._loops.values():
            loop.close()
