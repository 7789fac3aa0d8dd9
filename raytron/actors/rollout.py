"""Engines for rollouts: actors with an engine each, behind one `await generate(...)`.

    generate --+                              +-> engine actor: EngineLoop -> Engine (its other ranks are actors too)
    generate --+-> one message an engine -----+
    generate --+   and turn of the event loop +-> engine actor
                       <- one long poll an engine brings all that have finished

Rollouts are not streamed, so a request whose engine dies has lost nothing that anybody saw: it is issued again, and its
seed makes it the same. A dead engine is started again in the background, and is given no request before it has the
current weights (`fleet`). So is one that hangs: it answers its long poll, work or none, or is taken for dead. Requests
that arrive in one turn of the event loop (a group's samples do) travel together, as do answers; a message costs a
thousand times what a request in it does.

Engines have placement groups of their own, or they share the seats of a trainer's ranks and take turns with those
(`sleep`, `wake`). One that dies out of its turn is started again when that has come: before, there is no room for it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytron.actors.failures import WorkerError
from raytron.actors.fleet import Balancer, Fleet, Health
from raytron.actors.placement import Berth, CapacityError
from raytron.actors.replica import berths_for, bundles, start_engine
from raytron.actors.rollout_engine import Done, RolloutEngine, Start, Started
from raytron.config import EngineConfig, FailureConfig
from raytron.inference import EngineFailed, Pushed, Request, SamplingParams, Stats
from raytron.inference.launch import check_layout
from raytron.inference.types import PauseMode

__all__ = ["Generated", "RolloutError", "RolloutGroup"]

log = logging.getLogger(__name__)

POLL_S = 2.0  # how long an engine waits for something to report before it says that it is well
START_S = 1800.0  # for an engine to read its weights and compile what it compiles
CLOSE_S = 10.0


class RolloutError(RuntimeError):
    """A request could not be answered: its engines died, too often, or none is left."""


@dataclass(frozen=True)
class Generated:
    """One answer. token_ids int32 [T], logprobs float32 [T], versions int32 [T] of the weights that chose them.

    finish_reason: "stop", "length", or "abort" where a weight update or `RolloutGroup.abort` cut it short. engine: the
    number of the one that answered. cached_tokens: of the prompt, not computed again.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: str
    engine: int = 0
    cached_tokens: int = 0


class _Pending:
    """A request of the driver's until it is answered."""

    __slots__ = ("avoid", "cost", "engine", "future", "group", "lives", "request")

    def __init__(self, request: Request, group: Hashable, lives: int) -> None:
        self.request, self.group, self.lives = request, group, lives
        self.future: asyncio.Future[Generated] = asyncio.get_running_loop().create_future()
        self.cost = len(request.prompt_token_ids) + (request.params.max_tokens or 0)
        self.engine: int | None = None
        self.avoid: set[int] = set()


class RolloutGroup:
    """Engines that answer together; use it with `async with`, or `start` and `close` it on one event loop.

    Args:
        engines: of each engine its configuration; they may differ in layout and kind, not in the model.
        each: resources of one rank, by Ray's names; by default one CPU slot.
        failures: how many engine failures to survive by starting the engine again.
        attempts: how often a request is issued before its engines' failures are its own.
        timeout_s: an engine that does not answer for so long, or has work and makes no progress, counts as dead. Must
            exceed the longest step and weight update.
        wait_s: how long to wait for the cluster to grant the engines' placement groups.
        start: makes an actor's engine.
        beside: seats of a trainer's ranks to share, one for each rank of each engine, instead of placement groups.

    Attributes:
        fleet: health and versions of the engines.
        on_stale: asked to bring the current weights to an engine that was started again; set by `WeightSync`.
        on_state: told what an engine does from now on: "generating", "updating", "idle", "restarting" or "lost".

    Raises:
        ValueError: no engines, a model that cannot be cut to an engine's layout, or too few seats to share.
    """

    def __init__(
        self,
        engines: Sequence[EngineConfig],
        each: Mapping[str, float] | None = None,
        *,
        failures: FailureConfig | None = None,
        attempts: int = 3,
        timeout_s: float = 600.0,
        wait_s: float = 30.0,
        start: Start = start_engine,
        beside: Sequence[Berth] = (),
    ) -> None:
        if not engines:
            raise ValueError("a rollout group needs at least one engine")
        for config in dict.fromkeys(engines):
            check_layout(config)
        self.configs, self._each = tuple(engines), dict(each or {"CPU": 1})
        self._attempts, self._timeout_s, self._wait_s, self._start = attempts, timeout_s, wait_s, start
        awaits = any(config.weights == "await" for config in engines)
        failures = failures or FailureConfig(max_failures=3)
        self.fleet = Fleet(len(engines), failures.max_failures, None if awaits else 0)
        self.on_stale: Callable[[int], Awaitable[None]] | None = None
        self.on_state: Callable[[int, str], None] | None = None
        self._updating = [0] * len(engines)
        self._balancer = Balancer(len(engines))
        self._berths = berths_for(engines, beside)
        self._groups: list[PlacementGroup] = []
        self._turn = asyncio.Event()  # set while it is theirs
        self._turn.set()
        self._sleep_without_weights = False
        self._actors: list[Any] = [None] * len(engines)
        self._started: list[Started | None] = [None] * len(engines)
        self._pending: dict[str, _Pending] = {}
        self._arrived: deque[_Pending] = deque()
        self._due = False
        self._names = map(str, itertools.count())
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: Exception | None = None
        self._closed = False

    # ---------------------------------------------------------------------------------------------------------- a life

    async def start(self) -> RolloutGroup:
        """Take the seats and start all engines; returns when they run.

        Raises:
            CapacityError: the cluster did not grant a placement group in time; nothing stays reserved.
            ValueError, RuntimeError: an engine's own reason not to start.
        """
        try:
            await self._place()
            for engine, started in enumerate(await asyncio.gather(*map(self._launch, range(len(self.configs))))):
                self._run(engine, started)
        except BaseException:
            await self.close()
            raise
        return self

    async def _place(self) -> None:
        if any(self._berths):
            return
        self._groups = [placement_group(bundles(config, self._each), strategy="PACK") for config in self.configs]
        granted = await asyncio.gather(*(asyncio.to_thread(group.wait, self._wait_s) for group in self._groups))
        if not all(granted):
            raise CapacityError(
                f"the cluster granted {sum(granted)} of {len(granted)} engines their seats within "
                f"{self._wait_s:g} s; an engine wants {bundles(self.configs[0], self._each)}: ask for fewer engines or "
                "less for each, or add nodes"
            )

    async def _launch(self, engine: int) -> Started:
        """Start the actor of an engine, and the engine in it."""
        config, berths = self.configs[engine], self._berths[engine]
        options = berths[0].options() if berths else self._options(engine)
        actor = self._actors[engine] = RolloutEngine.options(**options, enable_task_events=False).remote()
        try:
            return await asyncio.wait_for(actor.start.remote(config, self._each, self._start, berths), START_S)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, ValueError | RuntimeError) else error) from None
        except TimeoutError:
            raise RuntimeError(f"rollout engine {engine} did not start within {START_S:g} s") from None

    def _options(self, engine: int) -> dict[str, Any]:
        """Ray's options of an engine's actor, in its placement group."""
        config = self.configs[engine]
        # An engine of one process per rank has rank 0 here; vLLM runs its ranks itself.
        mine = bundles(config, self._each)[0] if config.engine == "vllm" else self._each
        custom = {name: need for name, need in mine.items() if name not in ("CPU", "GPU", "memory")}
        return {
            "num_cpus": mine.get("CPU", 0),
            "num_gpus": mine.get("GPU", 0),
            "memory": mine.get("memory"),
            "resources": custom or None,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._groups[engine], 0),
        }

    def _run(self, engine: int, started: Started) -> None:
        self._started[engine] = started
        self.fleet.started(engine, started.version)
        self._tell(engine)
        self._tasks.append(asyncio.ensure_future(self._attend(engine)))
        self._dispatch_soon()

    async def _attend(self, engine: int) -> None:
        """Hear what an engine has done until it fails; then see to its requests, and start it again."""
        try:
            try:
                while True:
                    self._deliver(engine, await self._collected(engine))
            except RayError as error:
                await self._replace(engine, _reason(error))
            except TimeoutError:
                await self._replace(engine, f"it did not answer within {self._timeout_s:g} s")
        except Exception as error:  # nobody awaits this task: those who wait for answers must hear of it
            log.exception("the rollout group failed")
            # A trainer that could not bring an engine its weights is started again, and the engines with it.
            told = error if isinstance(error, WorkerError) else RolloutError(f"the rollout group failed: {error}")
            self._failure = self._failure or told
            for pending in list(self._pending.values()):
                self._fail(pending, told)

    async def _collected(self, engine: int) -> list[Done]:
        poll_s = min(POLL_S, self._timeout_s)
        news = self._actors[engine].collect.remote(poll_s, self._timeout_s)
        return await asyncio.wait_for(news, poll_s + self._timeout_s)

    async def _replace(self, engine: int, reason: str) -> None:
        log.warning("rollout engine %d failed: %s", engine, reason)
        while True:
            again = self.fleet.failed(engine, reason)
            self._tell(engine)
            self._requeue(engine)
            ray.kill(self._actors[engine])
            if not again:
                break
            try:
                await self._turn.wait()
                started = await self._launch(engine)
                await self._in_turn(engine)
            except (RayError, ValueError, RuntimeError) as error:
                reason = f"it did not start again: {_reason(error)}"
                continue
            self._run(engine, started)
            if engine in self.fleet.of(Health.STALE) and self.on_stale is not None:
                await self.on_stale(engine)
            return
        self._dispatch_soon()  # which says so to all that wait, if it was the last

    async def _in_turn(self, engine: int) -> None:
        """Have an engine that has come up out of its turn sleep until that has come."""
        if not self._turn.is_set():
            actor = self._actors[engine]
            await actor.sleep.remote(self._sleep_without_weights)
            await self._turn.wait()
            await actor.wake.remote()

    async def close(self) -> None:
        """End the engines and give their seats back; requests under way raise RolloutError. Twice does nothing."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for pending in list(self._pending.values()):
            self._fail(pending, RolloutError("the rollout group was closed"))
        actors = [actor for actor in self._actors if actor is not None]
        # One that died may wait for a seat that never comes, and has nothing to close.
        replaced = {e for e in self.fleet.of(Health.STARTING) if self.fleet.states[e].reason}
        told = [actor for e, actor in enumerate(self._actors) if actor is not None and e not in replaced]
        closing = asyncio.gather(*(actor.close.remote() for actor in told), return_exceptions=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(closing, CLOSE_S)
        for actor in actors:
            ray.kill(actor)
        for group in self._groups:
            remove_placement_group(group)

    async def __aenter__(self) -> RolloutGroup:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -------------------------------------------------------------------------------------------------------- requests

    async def generate(self, token_ids: Sequence[int], params: SamplingParams, group: Hashable = None) -> Generated:
        """Continue a prompt, on the engine with the least to do, or where others of its `group` are.

        params: with n = 1; samples of one prompt are requests of one group, each with its seed.

        Raises:
            ValueError: the request can never be answered.
            RolloutError: its engines died `attempts` times, or no engine is left.
            WorkerError: a trainer died that was to bring an engine its weights.
        """
        if params.n != 1:
            raise ValueError(f"n is {params.n}; ask for each sample by itself, with the same group")
        if self._closed:
            raise RolloutError("the rollout group was closed")
        if self._failure is not None:
            raise self._failure
        request = Request(next(self._names), tuple(token_ids), params)
        pending = self._pending[request.id] = _Pending(request, group, self._attempts)
        self._arrived.append(pending)
        self._dispatch_soon()
        try:
            return await pending.future
        except asyncio.CancelledError:
            self._forget(pending)
            raise

    def _dispatch_soon(self) -> None:
        """Send what has arrived when this turn of the event loop is over: what arrives together travels together."""
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._due = False
        if self.fleet.hopeless:
            why = "; ".join(f"engine {e}: {state.reason}" for e, state in enumerate(self.fleet.states))
            while self._arrived:
                self._fail(self._arrived.popleft(), RolloutError(f"no engine is left to answer ({why})"))
        ready = self.fleet.ready
        if not ready or not self._turn.is_set():
            return  # they wait for an engine that starts, for its weights, or for its turn
        batches: dict[int, list[Request]] = {}
        while self._arrived:
            pending = self._arrived.popleft()
            if not pending.future.done():
                pending.engine = self._balancer.choose(pending.cost, ready, pending.group, pending.avoid)
                batches.setdefault(pending.engine, []).append(pending.request)
        for engine, requests in batches.items():
            self._actors[engine].submit.remote(requests)
            self._tell(engine)

    def _deliver(self, engine: int, done: Sequence[Done]) -> None:
        for id, tokens, logprobs, versions, reason, cached, invalid in done:
            pending = self._pending.pop(id, None)
            if pending is None:
                continue
            self._balancer.done(engine, pending.cost)
            if pending.future.done():
                continue
            if invalid is not None:
                pending.future.set_exception(ValueError(invalid))
            else:
                pending.future.set_result(Generated(tokens, logprobs, versions, reason, engine, cached))
        self._tell(engine)

    def _requeue(self, engine: int) -> None:
        """Issue again what a failed engine had."""
        reason = self.fleet.states[engine].reason
        for pending in [p for p in self._pending.values() if p.engine == engine]:
            self._balancer.done(engine, pending.cost)
            pending.engine = None
            pending.avoid.add(engine)
            pending.lives -= 1
            if pending.lives <= 0:
                self._fail(pending, RolloutError(f"its engines failed {self._attempts} times, the last one: {reason}"))
            else:
                self._arrived.append(pending)
        self._dispatch_soon()

    def _fail(self, pending: _Pending, error: Exception) -> None:
        self._pending.pop(pending.request.id, None)
        if not pending.future.done():
            pending.future.set_exception(error)

    def _forget(self, pending: _Pending) -> None:
        """Nobody waits for it any more."""
        if self._pending.pop(pending.request.id, None) is not None and pending.engine is not None:
            self._balancer.done(pending.engine, pending.cost)
            self._actors[pending.engine].abort.remote([pending.request.id])
            self._tell(pending.engine)

    # ------------------------------------------------------------------------------------------------- all the engines

    def node(self, engine: int) -> str:
        """Ray's id of the node that an engine was started on."""
        return self._started[engine].node

    def device(self, engine: int) -> str:
        """`device_memory.identity` of the GPU that all of an engine is on; "" if it is elsewhere."""
        return self._started[engine].device

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together that every engine has room for."""
        return min(started.max_model_len for started in self._started if started is not None)

    def updated(self, engine: int, version: int) -> None:
        """An engine has confirmed weights; if it was STALE it may be given requests now."""
        self.fleet.updated(engine, version)
        self._dispatch_soon()

    async def update(self, engine: int, weights: Pushed | str, mode: PauseMode, version: int) -> tuple[int, int | None]:
        """Have an engine take new weights; see `RolloutEngine.update`, and `call` for what it raises."""
        self._updating[engine] += 1
        self._tell(engine)
        try:
            return await self.call(engine, "update", weights, mode, version)
        finally:
            self._updating[engine] -= 1
            self._tell(engine)

    def _tell(self, engine: int) -> None:
        """Tell whoever wants to know what the engine does now."""
        if self.on_state is not None:
            health = self.fleet.states[engine].health
            working = "generating" if self._balancer.outstanding[engine] else "idle"
            what = "updating" if self._updating[engine] else working
            self.on_state(engine, what if self._runs(engine) else "lost" if health is Health.LOST else "restarting")

    def call(self, engine: int, method: str, *args: Any) -> Coroutine[Any, Any, Any]:
        """A method of an engine's actor. Raises EngineFailed when that is gone, else what the method raises."""
        return self._answer(engine, self._actors[engine] if self._runs(engine) else None, method, args)

    def _runs(self, engine: int) -> bool:
        return self.fleet.states[engine].health in (Health.STALE, Health.READY)

    async def _answer(self, engine: int, actor: Any, method: str, args: Sequence[Any]) -> Any:
        if actor is None:
            raise EngineFailed(f"rollout engine {engine} is {self.fleet.states[engine].health}")
        try:
            return await getattr(actor, method).remote(*args)
        except RayActorError as error:
            raise EngineFailed(f"rollout engine {engine}: {_reason(error)}") from None
        except RayTaskError as error:
            raise (error.cause or error) from None

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Have no engine compute until `resume`."""
        await self._all("pause", mode)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._all("resume")

    async def sleep(self, weights: bool = False) -> None:
        """Have no engine compute until `wake`, and all give back the memory of their caches, to who shares their seats.

        weights: that of their weights too; a push brings them back.
        """
        self._turn.clear()
        self._sleep_without_weights = weights
        await self._all("sleep", weights)

    async def wake(self) -> None:
        """Go on after `sleep`; without one nothing happens."""
        if not self._turn.is_set():
            await self._all("wake")
            self._turn.set()
            self._dispatch_soon()

    async def stats(self) -> dict[int, Stats]:
        """Of the engines that run."""
        return await self._all("stats")

    async def _all(self, method: str, *args: Any) -> dict[int, Any]:
        engines = [engine for engine in range(len(self.configs)) if self._runs(engine)]
        found = await asyncio.gather(*(self.call(e, method, *args) for e in engines), return_exceptions=True)
        for answer in found:
            if isinstance(answer, BaseException) and not isinstance(answer, EngineFailed):
                raise answer
        return {e: a for e, a in zip(engines, found, strict=True) if not isinstance(a, BaseException)}


def _reason(error: BaseException) -> str:
    """One line."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
