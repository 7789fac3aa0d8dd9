"""Trained weights into rollout engines: one push, proved on every engine.

    trainer ranks  --publish-->  shared directory of their node  --update-->  every engine of that node
         \\--outgoing--> object store --> holder of another node --> its directory --update--> its engines

There is one copy a node, in shared memory (`parallel.shared`), which the trainer's ranks write in parallel, each its
own part, and out of which every rank of every engine takes its own boxes. The trainer's checksum of every tensor
travels with the push and every engine answers with that of what it then holds; an engine that skipped an update cannot
answer so. Pushes come one at a time: nothing is written before all engines have answered for the push before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytron.actors.fleet import Health
from raytron.actors.rollout import RolloutError, RolloutGroup
from raytron.actors.worker import Where
from raytron.checkpoint.huggingface import small_files
from raytron.checkpoint.publisher import Outgoing, Published
from raytron.checkpoint.storage import Storage
from raytron.inference import EngineFailed, Pushed, WeightUpdateError
from raytron.inference.engine import engine_arch, model_dtype
from raytron.inference.types import PauseMode
from raytron.models import build
from raytron.models.adapters import resolve_lora
from raytron.parallel.changes import Receiver
from raytron.parallel.checksum import combine, fold
from raytron.parallel.collectives import GaveUp
from raytron.parallel.layout import Spec, retype
from raytron.parallel.shared import SharedDirectory, SharedWeights
from raytron.parallel.storage import torch_dtype

__all__ = ["LocalTrainer", "PushReport", "Trainer", "WeightSync"]

log = logging.getLogger(__name__)


class Trainer(Protocol):
    """The side that has the weights: an `ActorGroup` whose engines have the methods of `Publisher` that are called.

    `connect_publisher(directories, nodes, dtype, adapters)`, `publish(turn, delta)` and `outgoing(node, message,
    delta)`, each passed on to the rank's `Publisher` (the first to `connect`).
    """

    where: Sequence[Where]
    workers: Sequence[Any]

    def call(self, method: str, *args: Any) -> list[Any]:
        """The method on every rank, waited for; what each returned."""


class LocalTrainer:
    """Trainer ranks in this process, such as the one of a run without trainer actors: for engines of this node."""

    workers = ()

    def __init__(self, ranks: Sequence[Any]) -> None:
        self._ranks = list(ranks)
        node = ray.get_runtime_context().get_node_id()
        self.where = [Where(node, socket.gethostname(), os.getpid(), ())] * len(self._ranks)

    def call(self, method: str, *args: Any) -> list[Any]:
        """See `Trainer`."""
        return [getattr(rank, method)(*args) for rank in self._ranks]


@dataclass(frozen=True)
class PushReport:
    """One push. nbytes: of what was pushed, in the engines' dtype: the model, or once that is there its adapters.
    checksum: `checksum.fold` of all that the engines now hold.

    seconds: "publish" (the trainer writes), "send" (to other nodes), "update" (engines take it in), "total". engines:
    those that confirmed it. failed: those that died meanwhile; they are started again and given it then.
    """

    version: int
    nbytes: int
    checksum: int
    seconds: Mapping[str, float]
    engines: tuple[int, ...]
    failed: tuple[int, ...] = ()


@ray.remote(num_cpus=0, max_restarts=0)
class Holder:
    """Owns a node's shared directory, and writes into it what comes from other nodes."""

    def create(self, tensors: Mapping[str, Spec], files: Mapping[str, bytes], fallback: str) -> str:
        """Make the directory; its path."""
        self._directory = SharedDirectory(tensors, files, fallback)
        self._shared = SharedWeights(self._directory.path)
        self._receivers: dict[tuple[int, int], Receiver] = {}
        return self._directory.path

    def expect(self, sender: int, messages: Sequence[Any]) -> None:
        """What a rank will send."""
        for number, boxes in enumerate(messages):
            self._receivers[sender, number] = Receiver(self._shared, boxes)

    def receive(self, sender: int, number: int, message: np.ndarray, turn: int, delta: bool) -> None:
        """Write a message of `Publisher.outgoing`."""
        self._receivers[sender, number].write(message, turn, delta)

    def close(self) -> None:
        """Remove the directory."""
        self._directory.close()


@dataclass
class _State:
    """Directories in use, and what engines that were started again are to be given."""

    holders: dict[str, Any] = field(default_factory=dict)
    directories: dict[str, str] = field(default_factory=dict)
    outgoing: Sequence[Outgoing] = ()
    turn: int = 0
    version: int | None = None
    checksums: Mapping[str, int] = field(default_factory=dict)


class WeightSync:
    """Pushes a trainer's weights into the engines of a rollout group.

    Args:
        trainer: see `Trainer`. After its ranks were replaced or cut anew, call `reset`.
        fallback: folder for the shared directories where /dev/shm has no room.

    Raises:
        ValueError: engines of several dtypes or adapters; there is one copy of the weights a node.
    """

    def __init__(self, rollouts: RolloutGroup, trainer: Trainer, fallback: str | None = None) -> None:
        self._rollouts, self._trainer = rollouts, trainer
        self._fallback = fallback or tempfile.gettempdir()
        dtypes = {str(model_dtype(config)).removeprefix("torch.") for config in rollouts.configs}
        if len(dtypes) != 1:
            raise ValueError(f"engines compute in {' and '.join(sorted(dtypes))}; give all of them one engine.dtype")
        (self._dtype,) = dtypes
        if len({config.lora for config in rollouts.configs}) != 1:
            raise ValueError("engines have not all the same adapters; give all of them one engine.lora")
        self._state = _State()
        self._lock = asyncio.Lock()
        rollouts.on_stale = self._catch_up

    async def push(self, version: int, mode: PauseMode = "keep", delta: bool = False) -> PushReport:
        """Bring the trainer's weights, as they are now, to every engine.

        Args:
            version: what engines report with their tokens from now on.
            mode: what becomes of running requests: "keep" goes on with the new weights, what is cached of them computed
                anew; "wait" lets them finish first; "abort" ends them.
            delta: leave alone what has not changed since the last push; the result has the same bits.

        Raises:
            WeightUpdateError: an engine holds other weights than were pushed; names it and the tensor.
            WorkerError: a rank of the trainer failed.
            RolloutError: no engine runs.
        """
        async with self._lock:
            start = time.perf_counter()
            published = await self._publish(delta)
            sent_from = time.perf_counter()
            published = await self._sent(published, delta)
            state, rollouts = self._state, self._rollouts
            updated_from = time.perf_counter()
            state.checksums = {**state.checksums, **combine(part.checksums for part in published)}
            state.version = version
            rollouts.fleet.published(version)
            engines = rollouts.fleet.of(Health.STALE, Health.READY)
            updates = (self._update(engine, mode) for engine in engines)
            answers = await asyncio.gather(*updates, return_exceptions=True)  # nobody reads any more when this returns
            if (error := next((answer for answer in answers if isinstance(answer, BaseException)), None)) is not None:
                raise error
            end = time.perf_counter()
        seconds = {"publish": sent_from - start, "send": updated_from - sent_from, "update": end - updated_from}
        confirmed = tuple(engine for engine, ok in zip(engines, answers, strict=True) if ok)
        failed = tuple(engine for engine in range(len(rollouts.configs)) if engine not in confirmed)
        nbytes = sum(part.nbytes for part in published)
        return PushReport(version, nbytes, fold(state.checksums), seconds | {"total": end - start}, confirmed, failed)

    async def verify(self) -> int:
        """Have every engine sum up what it holds at this moment, and hold it against the last push.

        Returns the folded checksum. Raises WeightUpdateError naming an engine that is behind, or holds other weights.
        """
        async with self._lock:
            for engine in self._rollouts.fleet.ready:
                with suppress(EngineFailed):  # it is being replaced
                    await self._confirmed(engine, self._rollouts.call(engine, "verify", self._pushed(engine)))
            return fold(self._state.checksums)

    async def reset(self) -> None:
        """Forget the directories: the next push makes new ones, and is whole. For a trainer that was cut anew."""
        async with self._lock:
            await self._close()

    async def close(self) -> None:
        """Remove the directories."""
        await self.reset()
        self._rollouts.on_stale = None

    # ---------------------------------------------------------------------------------------------------------- inside

    async def _connect(self) -> None:
        """Have a directory on every node with an engine, and the trainer's plans for them."""
        rollouts = self._rollouts
        nodes = sorted({rollouts.node(e) for e in rollouts.fleet.of(Health.STALE, Health.READY)})
        if self._state.directories and set(nodes) <= set(self._state.directories):
            return
        if not nodes:
            raise RolloutError("no engine runs that weights could be pushed to")
        await self._close()
        state = self._state
        tensors, files = await asyncio.to_thread(self._contents)
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            state.holders[node] = Holder.options(scheduling_strategy=strategy).remote()
        made = (holder.create.remote(tensors, files, self._fallback) for holder in state.holders.values())
        state.directories = dict(zip(nodes, await asyncio.gather(*made), strict=True))
        await self._plan()

    async def _plan(self) -> None:
        state, trainer = self._state, self._trainer
        ranks = tuple(where.node for where in trainer.where)
        args = (state.directories, ranks, self._dtype, resolve_lora(self._rollouts.configs[0].lora).rank > 0)
        state.outgoing = await asyncio.to_thread(trainer.call, "connect_publisher", *args)
        if any(state.outgoing) and not trainer.workers:
            raise ValueError("a trainer in the driver's process reaches engines of its own node; use trainer actors")
        await asyncio.gather(
            *(
                state.holders[node].expect.remote(rank, messages)
                for rank, outgoing in enumerate(state.outgoing)
                for node, messages in outgoing.items()
            )
        )

    def _contents(self) -> tuple[Mapping[str, Spec], Mapping[str, bytes]]:
        """Tensors and small files of a directory, from the engines' own."""
        config = self._rollouts.configs[0]
        layout = build(engine_arch(config), device="meta").layout()
        return retype(layout, self._dtype).tensors, small_files(Storage.open(config.path), torch_dtype(self._dtype))

    async def _publish(self, delta: bool) -> Sequence[Published]:
        await self._connect()
        state = self._state
        state.turn, state.version = state.turn + 1, None  # what is there is neither old nor new
        return await asyncio.to_thread(self._trainer.call, "publish", state.turn, delta)

    async def _sent(self, published: Sequence[Published], delta: bool) -> Sequence[Published]:
        """Once other nodes have it too. A node that is gone is done without, and the push begun anew."""
        try:
            await self._send(published, delta)
            return published
        except RayActorError as error:
            log.warning("a node with engines is gone (%s); the push begins anew without it", error)
            await self._close()
        published = await self._publish(delta)
        await self._send(published, delta)
        return published

    async def _send(self, published: Sequence[Published], delta: bool) -> None:
        """What other nodes need, from each rank to the node's holder; the driver only passes references on."""
        links = [(rank, *link) for rank, part in enumerate(published) for link in part.messages.items()]
        await asyncio.gather(*(self._send_along(*link, delta) for link in links))

    async def _send_along(self, rank: int, node: str, messages: Sequence[int], delta: bool) -> None:
        """From one rank to one node, a message at a time: they must not fill the object store."""
        state = self._state
        for number in messages:
            message = self._trainer.workers[rank].call.remote("outgoing", node, number, delta)
            await state.holders[node].receive.remote(rank, number, message, state.turn, delta)

    def _pushed(self, engine: int) -> Pushed:
        state = self._state
        return Pushed(state.directories[self._rollouts.node(engine)], state.turn, state.checksums)

    async def _update(self, engine: int, mode: PauseMode) -> bool:
        """Have an engine take the push in; whether it did, or has died."""
        state, rollouts = self._state, self._rollouts
        try:
            await self._confirmed(engine, rollouts.update(engine, self._pushed(engine), mode, state.version))
        except (EngineFailed, GaveUp) as error:  # it is being replaced
            log.warning("rollout engine %d failed during a push: %s", engine, error)
            return False
        if engine in rollouts.fleet.of(Health.STALE, Health.READY):
            rollouts.updated(engine, state.version)
        return True

    async def _confirmed(self, engine: int, answer: Any) -> None:
        state = self._state
        try:
            version, checksum = await answer
        except WeightUpdateError as error:
            raise WeightUpdateError(f"rollout engine {engine}: {error}") from None
        if version != state.version:
            raise WeightUpdateError(
                f"rollout engine {engine} answers with weights of version {version} after version {state.version} was "
                "pushed: it has skipped an update"
            )
        if checksum != fold(state.checksums):
            raise WeightUpdateError(
                f"rollout engine {engine} confirms version {version} with checksum {checksum} of all its tensors, the "
                f"trainer's is {fold(state.checksums)}"
            )

    async def _catch_up(self, engine: int) -> None:
        """Give the weights in force to an engine that was started again."""
        async with self._lock:
            state, rollouts = self._state, self._rollouts
            if engine not in rollouts.fleet.of(Health.STALE) or state.version is None:
                return  # the next push will reach it
            if rollouts.node(engine) not in state.directories:
                log.warning("rollout engine %d was started on a new node; it waits for the next push", engine)
                return
            await self._update(engine, "keep")

    async def _close(self) -> None:
        holders, self._state = self._state.holders, _State()
        for holder in holders.values():
            try:
                await holder.close.remote()
            except RayActorError:
                log.debug("a node with weights was gone")
            ray.kill(holder)
