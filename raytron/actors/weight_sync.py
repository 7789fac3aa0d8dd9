"""Trained weights into rollout engines: one push, proved on every engine.

    trainer ranks  --publish-->  shared directory of their node  --update-->  every engine of that node, at once
         \\--outgoing--> object store --> holder of another node --> its directory --update--> its engines

There is one copy a node, in shared memory (`parallel.shared`), which the trainer's ranks write in parallel, each its
own part, and out of which every rank of every engine takes its own boxes. The trainer's checksum of every tensor
travels with the push and every engine answers with that of what it then holds; an engine that skipped an update cannot
answer so. Pushes come one at a time: nothing is written before all engines have answered for the push before.

Native engines of the trainer's own nodes are told of a push when the trainer is, and take each block as it is written
(`parallel.progress`). A trainer that fails in the middle leaves them with some of its weights: they are STALE, and keep
what they were asked, until another push has come. vLLM, which reads whole files, and engines of nodes that are sent
what they need, take a push when it is there. Where every engine is on one GPU with ranks that hold its whole model,
nothing is written: engines copy out of the trainer's memory (`parallel.device_memory`).

An engine that starts between two pushes takes what its node's directory holds. On a node that has none yet a directory
is made as a copy of another node's, from memory to memory, without the trainer, which may be at work on the next step.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytron.actors.fleet import Health
from raytron.actors.holder import Holder
from raytron.actors.members import living_nodes
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
from raytron.parallel.checksum import combine, fold
from raytron.parallel.collectives import GaveUp
from raytron.parallel.device_memory import Offer, in_reach
from raytron.parallel.layout import Spec, retype
from raytron.parallel.progress import WriterGone
from raytron.parallel.storage import torch_dtype

__all__ = ["LocalTrainer", "PushReport", "Trainer", "WeightSync"]

log = logging.getLogger(__name__)

LOOK_S = 0.2  # how often to look for an engine while none runs
PEER = -1  # the sender of another node's directory, where the trainer's are ranks


class Trainer(Protocol):
    """The side that has the weights: an `ActorGroup` whose engines have the methods of `Publisher` that are called.

    `connect_publisher(directories, nodes, dtype, adapters[, consumers])`, `publish(turn, delta)` and `outgoing(node,
    message, delta)`, each passed on to the rank's `Publisher` (the first to `connect`).
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

    seconds: "publish" (the trainer writes, and engines that can take it in beside it), "send" (to other nodes),
    "update" (what is then left to the engines), "total". engines: those that confirmed it. failed: those that died
    meanwhile; they are started again and given it then.
    """

    version: int
    nbytes: int
    checksum: int
    seconds: Mapping[str, float]
    engines: tuple[int, ...]
    failed: tuple[int, ...] = ()


@dataclass
class _State:
    """Where pushes go, and what engines that were started (again) are to be given. devices: engine -> its GPU, where
    none needs a directory. reached: nodes whose directories the trainer knows of; others are copies."""

    holders: dict[str, Any] = field(default_factory=dict)
    directories: dict[str, str] = field(default_factory=dict)
    devices: dict[int, str] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    outgoing: Sequence[Outgoing] = ()
    turn: int = 0
    version: int | None = None
    checksums: Mapping[str, int] = field(default_factory=dict)
    published: Sequence[Published] = ()


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
        self._apart = False  # the trainer's ranks have not all that engines on the same GPUs want
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
            WorkerError: a rank of the trainer failed; engines that had begun to take the push in are STALE.
            RolloutError: no engine is left.
        """
        async with self._lock:
            start = time.perf_counter()
            await self._connect()
            state, rollouts = self._state, self._rollouts
            state.turn, state.version = state.turn + 1, None  # what is there is neither old nor new
            taking = {e: asyncio.ensure_future(self._told(e, mode, version, None)) for e in self._followers()}
            try:
                published = await self._publish(delta)
                sent_from = time.perf_counter()
                published = await self._sent(published, delta)
            except BaseException:
                await self._give_up(taking)
                raise
            state = self._state
            updated_from = time.perf_counter()
            state.checksums = {**state.checksums, **combine(part.checksums for part in published)}
            state.version = version
            rollouts.fleet.published(version)
            # One that came up where nothing is pushed to, meanwhile, is brought the weights by `_catch_up`.
            running = rollouts.fleet.of(Health.STALE, Health.READY)
            engines = sorted({*taking, *(engine for engine in running if self._known(engine))})
            updates = (self._update(engine, mode, taking.get(engine)) for engine in engines)
            answers = await asyncio.gather(*updates, return_exceptions=True)  # nobody reads any more when this returns
            if (error := next((answer for answer in answers if isinstance(answer, BaseException)), None)) is not None:
                raise error
            end = time.perf_counter()
        seconds = {"publish": sent_from - start, "send": updated_from - sent_from, "update": end - updated_from}
        confirmed = tuple(engine for engine, ok in zip(engines, answers, strict=True) if ok)
        failed = tuple(e for e in (*rollouts.fleet.present, *rollouts.fleet.of(Health.LOST)) if e not in confirmed)
        nbytes = sum(part.nbytes for part in published)
        return PushReport(version, nbytes, fold(state.checksums), seconds | {"total": end - start}, confirmed, failed)

    async def verify(self) -> int:
        """Have every engine sum up what it holds at this moment, and hold it against the last push.

        Returns the folded checksum. Raises WeightUpdateError naming an engine that is behind, or holds other weights.
        """
        async with self._lock:
            state, rollouts = self._state, self._rollouts
            for engine in rollouts.fleet.ready:
                pushed = self._pushed(engine, state.checksums)
                with suppress(EngineFailed):  # it is being replaced
                    await self._confirmed(engine, rollouts.call(engine, "verify", pushed))
            return fold(state.checksums)

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
        """Have the trainer's plans for where the engines are: its own GPUs, or nodes with a directory each."""
        rollouts, state = self._rollouts, self._state
        engines = rollouts.fleet.of(Health.STALE, Health.READY)
        if not engines:
            if state.directories or state.devices:
                return  # those that are being started again will be given it
            await self._nodes()
            engines = rollouts.fleet.of(Health.STALE, Health.READY)
        devices = {engine: rollouts.device(engine) for engine in engines}
        if all(devices.values()) and not self._apart:
            if state.devices != devices:
                await self._close()
                self._state.devices = devices
                await self._plan()
            return
        if not state.directories or not {rollouts.node(engine) for engine in engines} <= state.reached:
            nodes = await self._nodes()
            await self._close()
            await self._hold(nodes)
            await self._plan()

    async def _nodes(self) -> list[str]:
        """Nodes where engines run and that are there. While there is none, an engine that was lost is waited for."""
        rollouts, waits = self._rollouts, False
        while True:
            nodes = {rollouts.node(engine) for engine in rollouts.fleet.of(Health.STALE, Health.READY)}
            if nodes := sorted(nodes & living_nodes()):
                return nodes
            if rollouts.fleet.hopeless:
                raise RolloutError("no engine is left that weights could be pushed to")
            if not waits:
                log.warning("no engine runs; a push waits for one that is started again")
            waits = True
            await rollouts.wake()  # the trainer is done with the seats that engines may share with it
            await asyncio.sleep(LOOK_S)

    async def _hold(self, nodes: Sequence[str]) -> None:
        """A directory on each node."""
        state = self._state
        contents = await asyncio.to_thread(self._contents)
        ranks = [where.node for where in self._trainer.where]
        made = await asyncio.gather(*(self._directory(node, contents, ranks.count(node)) for node in nodes))
        state.directories, state.reached = dict(zip(nodes, made, strict=True)), frozenset(nodes)

    async def _directory(self, node: str, contents: tuple[Any, Any], writers: int) -> str:
        """Make a node's directory; its path."""
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        holder = self._state.holders[node] = Holder.options(scheduling_strategy=strategy).remote()
        return await holder.create.remote(*contents, self._fallback, writers)

    async def _plan(self) -> None:
        state, trainer = self._state, self._trainer
        ranks = tuple(where.node for where in trainer.where)
        args = [state.directories, ranks, self._dtype, resolve_lora(self._rollouts.configs[0].lora).rank > 0]
        args += [state.devices] if state.devices else []
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

    def _followers(self) -> list[int]:
        """Engines that take a push in while it is written: native ones, where nothing comes from other nodes."""
        if any(self._state.outgoing) or self._state.devices:
            return []
        configs = self._rollouts.configs
        return [e for e in self._rollouts.fleet.of(Health.STALE, Health.READY) if configs[e].engine == "native"]

    async def _give_up(self, taking: Mapping[int, asyncio.Future]) -> None:
        """The trainer failed while engines took what it wrote: release them. They wait for another push."""
        if not taking:
            return
        told = (holder.give_up.remote(self._state.turn) for holder in self._state.holders.values())
        await asyncio.gather(*told, return_exceptions=True)
        await asyncio.gather(*taking.values(), return_exceptions=True)
        for engine in taking:
            self._rollouts.fleet.mixed(engine)

    async def _publish(self, delta: bool) -> Sequence[Published]:
        state = self._state
        published = await asyncio.to_thread(self._trainer.call, "publish", state.turn, delta)
        if state.devices and not state.published and not self._reach(published):
            self._apart = True
            return await self._anew(delta)
        state.published = published
        return published

    def _reach(self, published: Sequence[Published]) -> bool:
        """Whether every engine finds all that it wants on its own GPU."""
        layout = build(engine_arch(self._rollouts.configs[0]), device="meta").layout()
        devices = self._state.devices.items()
        return all(in_reach(_offers(published, engine), layout, device) for engine, device in devices)

    async def _anew(self, delta: bool) -> Sequence[Published]:
        """Publish again, by new plans."""
        await self._close()
        await self._connect()
        self._state.turn = 1
        return await self._publish(delta)

    async def _sent(self, published: Sequence[Published], delta: bool) -> Sequence[Published]:
        """Once other nodes have it too. A node that is gone is done without, and the push begun anew."""
        try:
            await self._send(published, delta)
            return published
        except RayActorError as error:
            log.warning("a node with engines is gone (%s); the push begins anew without it", error)
        published = await self._anew(delta)
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

    def _pushed(self, engine: int, checksums: Mapping[str, int] | None) -> Pushed:
        """What an engine is told; checksums None: while the push is written."""
        state = self._state
        path = state.directories.get(self._rollouts.node(engine), "")
        return Pushed(path, state.turn, checksums, _offers(state.published, engine))

    def _told(self, engine: int, mode: PauseMode, version: int, checksums: Mapping[str, int] | None) -> Awaitable[Any]:
        return self._rollouts.update(engine, self._pushed(engine, checksums), mode, version)

    async def _update(self, engine: int, mode: PauseMode, taking: Awaitable[Any] | None = None) -> bool:
        """Have an engine take in what is written, unless it is `taking` it already; whether it did, or has died."""
        state, rollouts = self._state, self._rollouts
        try:
            await self._confirmed(engine, self._answer(engine, mode, taking))
        except (EngineFailed, GaveUp) as error:  # it is being replaced
            log.warning("rollout engine %d failed during a push: %s", engine, error)
            return False
        if engine in rollouts.fleet.of(Health.STALE, Health.READY):
            rollouts.updated(engine, state.version)
        return True

    async def _answer(self, engine: int, mode: PauseMode, taking: Awaitable[Any] | None) -> Any:
        if taking is not None:
            with suppress(WriterGone):  # it has lost patience with a trainer that has finished since
                return await taking
        return await self._told(engine, mode, self._state.version, self._state.checksums)

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
        """Give the weights in force to an engine that was started (again)."""
        async with self._lock:
            state, rollouts = self._state, self._rollouts
            if engine not in rollouts.fleet.of(Health.STALE) or state.version is None:
                return  # the next push will reach it
            if not self._known(engine):
                if not (await self._copy(rollouts.node(engine)) or await self._extend()):
                    return
            elif state.devices:  # there is no copy of what was pushed, but the trainer may still hold just that
                published = await self._publish(delta=False)
                if combine(part.checksums for part in published) != state.checksums:
                    return  # it trains: the next push is on its way
            await self._update(engine, "keep")

    async def _copy(self, node: str) -> bool:
        """Have what is in force on another node too, out of the memory of one that has it; whether that was possible.

        The checksums of the push prove the copy too. The next push is planned anew.
        """
        state, living = self._state, await asyncio.to_thread(living_nodes)
        peer = next((state.holders[one] for one in state.directories if one in living), None)
        if peer is None:
            return False
        try:
            path = await self._directory(node, await asyncio.to_thread(self._contents), 0)
            messages = await peer.contents.remote()
            await state.holders[node].expect.remote(PEER, messages)
            for number in range(len(messages)):
                message = peer.send.remote(number)
                await state.holders[node].receive.remote(PEER, number, message, state.turn, False)
        except RayError as error:
            log.warning("the weights of another node could not be copied: %s", error)
            if (holder := state.holders.pop(node, None)) is not None:
                ray.kill(holder)
            return False
        state.directories[node] = path
        return True

    def _known(self, engine: int) -> bool:
        """Whether what is pushed comes to where the engine is."""
        state, rollouts = self._state, self._rollouts
        return state.devices.get(engine, "") == rollouts.device(engine) != "" or (
            rollouts.node(engine) in state.directories
        )

    async def _extend(self) -> bool:
        """Have what is in force where all engines are, when one was started where nothing of it is.

        The trainer may have moved on by now, which its checksums show: then the next push is on its way, and reaches
        all of them. Otherwise nobody would push before this engine has answered.
        """
        version, checksums = self._state.version, self._state.checksums
        published = await self._sent(await self._anew(False), False)
        if combine(part.checksums for part in published) != checksums:
            return False
        self._state.version, self._state.checksums = version, checksums
        return True

    async def _close(self) -> None:
        holders, self._state = self._state.holders, _State()
        for holder in holders.values():
            try:
                await holder.close.remote()
            except RayActorError:
                log.debug("a node with weights was gone")
            ray.kill(holder)


def _offers(published: Sequence[Published], engine: int) -> tuple[Offer, ...]:
    return tuple(part.offers[engine] for part in published if engine in part.offers)
