"""What runs in a replica: an engine in its thread, asked through Ray Serve, answering through the channel.

A call of `ask` lasts as long as its request does, which is what Serve counts for scaling, waits for when the replica is
to end, and cancels when the client has gone. What comes of it is a verdict and never an exception: exceptions cross
processes badly, and a refusal is nothing exceptional.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import msgpack
import numpy as np
import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from raytron.actors.replica import start_engine
from raytron.config import EngineConfig
from raytron.inference import Engine, EngineFailed, EngineLoop, Output, Overloaded, Request, Stats, WeightUpdateError
from raytron.inference.types import PauseMode
from raytron.serving.channel import Address, Courier, LostError
from raytron.serving.lending import Held, Lender, Lent, Peers

__all__ = ["Ask", "EngineReplica", "Verdict", "Weights", "newest_weights", "remember_weights"]

log = logging.getLogger("raytron.serving")


class Weights(NamedTuple):
    """Weights in force: the `update`-th change of a model's weights put those at `path` there, as `version`.

    update 0 is what the model was started with.
    """

    update: int = 0
    path: str = ""
    version: int = 0


@dataclass(frozen=True)
class Ask:
    """A request on its way to a replica. name: of this attempt, under which its outputs travel."""

    name: str
    request: Request
    box: Address
    weights: Weights
    attempt: int = 0

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids, for the router."""
        return self.request.prompt_token_ids


class Verdict(NamedTuple):
    """How a request ended, or why it never began.

    kind: "done" with the number of outputs `sent`; "invalid" for a request that can't be answered; "busy" when the
    queue is full, for `retry_after_s`; "failed" when this engine can't answer, and another one may.
    """

    kind: Literal["done", "invalid", "busy", "failed"]
    message: str = ""
    sent: int = 0
    retry_after_s: float = 0.0


def newest_weights(key: str) -> Weights:
    """The weights that replicas of the model under `key` should have, as far as Ray's control store knows."""
    stored = _internal_kv_get(key.encode(), namespace=b"raytron")
    return Weights(*msgpack.unpackb(stored)) if stored else Weights()


def remember_weights(key: str, weights: Weights) -> None:
    """Tell replicas that start later."""
    _internal_kv_put(key.encode(), msgpack.packb(list(weights)), overwrite=True, namespace=b"raytron")


class EngineReplica:
    """The engine deployment's class.

    Args:
        name: of the model.
        config: of its engine.
        each: what one rank reserves.
        key: where `newest_weights` are noted.
        max_queue: requests that may wait for their first token.
        start: makes the engine.
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        each: Mapping[str, float],
        key: str,
        max_queue: int,
        start: Callable[[EngineConfig, Mapping[str, float]], Engine] = start_engine,
    ) -> None:
        self._key, self._first = key, Weights(0, config.path, 0)
        self._node = ray.get_runtime_context().get_node_id()
        self._engine_loop = EngineLoop(start(config, each), max_queue=max_queue, name=name)
        self._weights = self._first
        self._due = newest_weights(key).update  # changes that were made before there was this replica
        self._swapping = asyncio.Lock()
        self._peers = Peers(self._node)
        self._lender = Lender(self._engine_loop, self._peers.name)
        self._couriers: dict[bytes, asyncio.Future[Courier]] = {}

    async def ask(self, ask: Ask) -> Verdict:
        """Answer a request; outputs go to its mailbox."""
        try:
            await self._catch_up(ask.weights)
            courier = await self._courier(ask.box)
            return await self._answer(ask, courier)
        except Overloaded as error:
            return Verdict("busy", str(error), retry_after_s=error.retry_after_s)
        except (EngineFailed, LostError, WeightUpdateError) as error:
            return Verdict("failed", str(error))

    async def _answer(self, ask: Ask, courier: Courier) -> Verdict:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sent, unfinished = 0, ask.request.params.n

        def receive(outputs: list[Output], error: BaseException | None) -> None:
            nonlocal sent, unfinished
            if ended.done():
                return
            if outputs:
                courier.add(ask.name, outputs)
                sent += len(outputs)
                unfinished -= sum(output.finish_reason is not None for output in outputs)
            if error is not None:
                ended.set_exception(error)
            elif unfinished <= 0:
                ended.set_result(None)

        close = self._engine_loop.subscribe(replace(ask.request, id=ask.name), receive)
        try:
            await asyncio.wait((ended, courier.lost), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                return Verdict("failed", courier.lost.result(), sent)
            ended.result()
            return Verdict("done", sent=sent)
        except ValueError as error:
            return Verdict("invalid", str(error))
        except EngineFailed as error:
            return Verdict("failed", str(error), sent)
        finally:
            if not ended.done():
                ended.cancel()
            close()

    async def _courier(self, box: Address) -> Courier:
        """The way to a mailbox, opened by the first request from there."""
        known = self._couriers.get(box.token)
        if known is None or (known.done() and (known.exception() or known.result().lost.done())):
            known = self._couriers[box.token] = asyncio.ensure_future(Courier.connect(box, self._node))
        return await asyncio.shield(known)

    async def _catch_up(self, weights: Weights) -> None:
        """Have weights at least as new as these."""
        if weights.update > self._weights.update:
            try:
                await self._load(weights, "keep")
            except ValueError as error:  # they were there once
                raise WeightUpdateError(f"version {weights.version} is wanted, and gone: {error}") from error

    async def _load(self, weights: Weights, mode: PauseMode) -> None:
        async with self._swapping:
            if weights.update <= self._weights.update:
                return
            if weights.update <= self._due and await self._borrow(weights):
                return
            try:
                await self._engine_loop.update_weights(weights.path, mode, weights.version)
            except WeightUpdateError as error:
                log.error("%s; going back to %s", error, self._weights.path)
                await self._engine_loop.update_weights(self._weights.path, "keep", self._weights.version)
                raise
            self._weights = weights

    async def _borrow(self, weights: Weights) -> bool:
        """Take weights at least as new as these out of another replica's memory; whether one had them."""
        async with self._peers.borrowed(weights.update) as lent:
            if lent is None:
                return False
            newest = Weights(*lent.weights)
            try:
                await self._engine_loop.update_weights(lent.folder, "keep", newest.version)
            except (WeightUpdateError, ValueError) as error:  # it went meanwhile
                log.warning("another replica's weights could not be taken: %s", error)
                return False
            self._weights = newest
            return True

    async def holds(self) -> Held:
        """What it can lend to another replica."""
        return Held(self._lender.owner, self._node, self._weights.update if self._lender.able else -1)

    async def lend(self, owner: str) -> Lent | None:
        """Its weights, if it is `owner`; see `Lender.lend`."""
        if owner != self._lender.owner:
            return None
        async with self._swapping:
            return await self._lender.lend(self._weights)

    async def part(self, owner: str, start: int) -> np.ndarray | None:
        """uint8: a chunk of what it lends, if it is `owner`."""
        return await asyncio.to_thread(self._lender.part, start) if owner == self._lender.owner else None

    async def returned(self, owner: str) -> None:
        """A borrower is done."""
        if owner == self._lender.owner:
            self._lender.returned()

    async def swap(self, weights: Weights, mode: PauseMode) -> tuple[str, str]:
        """Load new weights under running requests: ("done", ""), or what is wrong with them.

        "invalid" is no weights at that path, "unfit" weights that do not fit, "failed" an engine that can't take any.
        After weights that did not fit the old ones are loaded again, so the replica goes on answering.
        """
        try:
            await self._load(weights, mode)
        except EngineFailed as error:
            return "failed", str(error)
        except WeightUpdateError as error:
            return "unfit", str(error)
        except ValueError as error:
            return "invalid", str(error)
        return "done", ""

    async def stats(self) -> Stats:
        """The engine's numbers."""
        return await self._engine_loop.stats()

    async def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self._engine_loop.max_model_len

    async def check_health(self) -> None:
        """Serve asks every few seconds, and replaces a replica that raises."""
        async with self._swapping:  # between two weights it is not well, and about to be
            health = (await self._engine_loop.stats()).health
        if health != "ready":
            raise RuntimeError(f"the engine is not well: {health}")
        await self._catch_up(newest_weights(self._key))

    def __del__(self) -> None:
        """Serve calls it when every request has been answered."""
        if hasattr(self, "_engine_loop"):
            self._engine_loop.close()
        if hasattr(self, "_lender"):
            self._lender.close()
