"""`Backend` over Ray Serve: models whose engines are replicas of deployments.

    generate: open a mailbox slot -> handle.ask (routed, queued, counted by Serve) -> outputs by the channel -> verdict

A request of which nothing has come yet is asked again elsewhere when its replica fails, and waits in Serve's queue
while there is none; after the first token the caller hears of it, who asks again where nobody has seen that token
(`answers`). A weight update goes to one replica first, so weights that do not fit cost nobody an answer, then is noted
for replicas that start later, then goes to all; every request carries the newest weights known here, so none is
answered by older ones after the update returns.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from raytron.inference import EngineFailed, Output, Overloaded, Request, Stats, WeightUpdateError
from raytron.inference.types import PauseMode
from raytron.serving.backend import Interrupted, ModelCard
from raytron.serving.channel import Address, Letters, LostError, Mailbox
from raytron.serving.replica import Ask, Verdict, Weights, newest_weights, remember_weights

__all__ = ["RayBackend", "backoff_s"]

log = logging.getLogger("raytron.serving")

ATTEMPTS = 10
QUEUE_FULL_S = 1.0  # what a client is told to wait when no replica is up yet and the queue for it is full


def backoff_s(attempt: int) -> float:
    """How long to wait before asking again after attempt number `attempt` (from 0) failed."""
    return min(0.1 * 2**attempt, 5.0)


@dataclass(frozen=True)
class Source:
    """Where a model's answers come from.

    card: what is known of it before a replica is up. handle: of its engine deployment. key: where its newest weights
    are noted. least: replicas there are to be at any time.
    """

    card: ModelCard
    handle: DeploymentHandle
    key: str
    least: int = 1


class _Served:
    """A model as seen from here."""

    def __init__(self, source: Source) -> None:
        self.card, self.key, self.least = source.card, source.key, source.least
        # By gRPC from process to process: 1.9 ms a call where Ray's actor calls take 3 to 4.
        self.handle = source.handle.options(_by_reference=False)
        self.weights = Weights()
        self.updating = asyncio.Lock()
        self.up = source.least


class RayBackend:
    """See `Backend`.

    Args:
        models: name -> where its answers come from.
        mailbox: not yet started.
    """

    def __init__(self, models: Mapping[str, Source], mailbox: Mailbox) -> None:
        self._served = {name: _Served(source) for name, source in models.items()}
        self._mailbox = mailbox
        self._box: Address | None = None
        self._me, self._count = secrets.token_hex(4), itertools.count()

    async def start(self) -> None:
        """Listen for outputs, and learn the weights in force."""
        self._box = await self._mailbox.start()
        for served in self._served.values():
            served.weights = newest_weights(served.key)

    async def close(self) -> None:
        """Listen no more."""
        await self._mailbox.close()

    def models(self) -> Mapping[str, ModelCard]:
        """What is served now."""
        return {name: replace(served.card, version=served.weights.version) for name, served in self._served.items()}

    async def generate(self, model: str, request: Request) -> AsyncGenerator[list[Output], None]:
        """See `Backend`."""
        served = self._served[model]
        for attempt in range(ATTEMPTS):
            begun = False
            try:
                async with aclosing(self._attempt(served, request, attempt)) as answer:
                    async for outputs in answer:
                        begun = True
                        yield outputs
                return
            except LostError as error:
                if begun:
                    raise Interrupted(f"{model}: {error}") from None
                if attempt == ATTEMPTS - 1:
                    raise EngineFailed(f"{model}: {error}") from None
                log.warning("%s: %s; asking again", model, error)
            await asyncio.sleep(backoff_s(attempt))

    async def _attempt(self, served: _Served, request: Request, attempt: int) -> AsyncGenerator[list[Output], None]:
        """Outputs of one attempt. Raises LostError where another one makes sense while nothing was yielded."""
        assert self._box is not None, "start comes first"
        name = f"{self._me}-{next(self._count)}"
        letters = self._mailbox.open(name, request.id)
        call = _call(served.handle.ask, Ask(name, request, self._box, served.weights, attempt))
        verdict = asyncio.ensure_future(_heard(call))
        verdict.add_done_callback(lambda done: done.cancelled() or _end(letters, done.result()))
        unfinished = request.params.n
        try:
            while unfinished > 0:
                outputs = await letters.read()
                unfinished -= sum(output.finish_reason is not None for output in outputs)
                yield outputs
        finally:
            self._mailbox.shut(name)
            if unfinished > 0 and not verdict.done():
                call.cancel()

    async def update_weights(self, model: str, path: str, mode: PauseMode = "keep", version: int | None = None) -> int:
        """See `Backend`."""
        served = self._served[model]
        async with served.updating:
            known = max(served.weights, newest_weights(served.key))
            weights = Weights(known.update + 1, path, known.version + 1 if version is None else version)
            if await self._everywhere(served, "max_model_len"):
                _check(*await _or_failed(_call(served.handle.swap, weights, mode)))
            elif not any(Path(path, f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
                raise ValueError(f"{path}: no model.safetensors or model.safetensors.index.json there")
            remember_weights(served.key, weights)
            served.weights = weights
            for kind, message in await self._everywhere(served, "swap", weights, mode):
                if kind != "done":  # Serve replaces it, and the next one has them from the start
                    log.error("%s: a replica could not take version %d: %s", model, weights.version, message)
        return weights.version

    async def stats(self, model: str) -> Sequence[Stats]:
        """See `Backend`."""
        return await self._everywhere(self._served[model], "stats")

    def problems(self) -> Mapping[str, str]:
        """See `Backend`; as of the last `look`."""
        return {name: "no engine is up" for name, served in self._served.items() if served.up < min(1, served.least)}

    async def look(self) -> None:
        """See which models have engines, and what those say of themselves."""
        for served in self._served.values():
            lengths = await self._everywhere(served, "max_model_len")
            served.up = len(lengths)
            if lengths:
                served.card = replace(served.card, max_model_len=min(lengths))

    async def _everywhere(self, served: _Served, method: str, *args: Any) -> list[Any]:
        """What each replica answers; without those that are gone."""
        try:
            results = await served.handle.broadcast(method, *args).results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        return [result for result in results if not isinstance(result, Exception)]


def _call(method: DeploymentHandle, *args: Any) -> DeploymentResponse:
    """Call it under a request id of its own.

    Serve takes the id from the context, which an HTTP request that came by Serve's proxy shares with all of its
    prompts, and its router tells calls apart by it: of two with one id, one may wait for ever.
    """
    return contextvars.Context().run(method.remote, *args)


async def _heard(call: Any) -> Verdict | Exception:
    """What a call came to, errors included."""
    try:
        return Verdict(*await call)
    except BackPressureError:
        return Verdict("busy", "no engine is up yet, and too many requests wait for one", retry_after_s=QUEUE_FULL_S)
    except Exception as error:
        return error


def _end(letters: Letters, heard: Verdict | Exception) -> None:
    """Tell the reader how its request ended."""
    if isinstance(heard, Exception):
        letters.fail(LostError(f"its replica is gone: {type(heard).__name__}"))
    elif heard.kind == "done":
        letters.expect(heard.sent)
    elif heard.kind == "busy":
        letters.fail(Overloaded(heard.retry_after_s, heard.message))
    elif heard.kind == "invalid":
        letters.fail(ValueError(heard.message))
    elif heard.sent:
        letters.fail(Interrupted(heard.message))
    else:
        letters.fail(LostError(heard.message))


async def _or_failed(call: Any) -> tuple[str, str]:
    try:
        return await call
    except (RayError, RayServeException) as error:
        return "failed", f"the replica is gone: {type(error).__name__}"


def _check(kind: str, message: str) -> None:
    if kind == "invalid":
        raise ValueError(message)
    if kind == "unfit":
        raise WeightUpdateError(message)
    if kind == "failed":
        raise EngineFailed(message)
