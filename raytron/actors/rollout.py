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

Where their number may change, engines join beside those that run (`grow`) and leave (`retire`): a leaving one finishes
what it has, and what it does not finish in time is issued again elsewhere. One whose node is gone leaves with it, the
others go on, and whoever decides on their number (`rollout_scaling`) starts another when there is room.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from raytron.actors.failures import WorkerError
from raytron.actors.fleet import Fleet, Health
from raytron.actors.members import living_nodes
from raytron.actors.placement import Berth, CapacityError
from raytron.actors.replica import berths_for, bundles, start_engine
from raytron.actors.rollout_engine import Done, RolloutEngine, Start, Started
from raytron.actors.rollout_requests import Generated, Requests, RolloutError
from raytron.actors.rollout_seats import EngineSeats
from raytron.config import EngineConfig, FailureConfig
from raytron.inference import EngineFailed, Pushed, SamplingParams, Stats
from raytron.inference.launch import check_layout
from raytron.inference.types import PauseMode
from raytron.parallel.collectives import GaveUp

__all__ = ["RolloutGroup"]

log = logging.getLogger(__name__)

POLL_S = 2.0  # how long an engine waits for something to report before it says that it is well
START_S = 1800.0  # for an engine to read its weights and compile what it compiles
CLOSE_S = 10.0
GRANT_S = 10.0  # for the cluster to grant seats that it is believed to have free
LOOK_S = 1.0  # how often to look whether an engine's node is still there while it is started again


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
        bounds: (fewest, most) engines, where their number may change: of `engines` the first `fewest` have to find
            seats at the start, and further ones are like the first.

    Attributes:
        fleet: health and versions of the engines.
        shares: they have no seats of their own.
        on_stale: asked to bring the current weights to an engine that was started (again); set by `WeightSync`.
        on_state: told what an engine does from now on: "generating", "updating", "idle", "restarting" or "lost".
        on_event: told that an engine "failed", "joined" or "left", as `on_event(event, engine=..., ...)`.

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
        bounds: tuple[int, int] | None = None,
    ) -> None:
        if not engines:
            raise ValueError("a rollout group needs at least one engine")
        for config in dict.fromkeys(engines):
            check_layout(config)
        self.configs, self.bounds = list(engines), bounds or (len(engines), len(engines))
        self._timeout_s, self._wait_s, self._start = timeout_s, wait_s, start
        awaits = any(config.weights == "await" for config in engines)
        failures = failures or FailureConfig(max_failures=3)
        self.fleet = Fleet(len(engines), failures.max_failures, None if awaits else 0, most=self.bounds[1])
        self.on_stale: Callable[[int], Awaitable[None]] | None = None
        self.on_state: Callable[[int, str], None] | None = None
        self.on_event: Callable[..., None] | None = None
        self._updating = [0] * len(engines)
        self._requests = Requests(len(engines), attempts)
        self.shares = bool(beside)
        self._seats = EngineSeats(each or {"CPU": 1}, berths_for(engines, beside))
        self._turn = asyncio.Event()  # set while it is theirs
        self._turn.set()
        self._sleep_without_weights = False
        self._actors: list[Any] = [None] * len(engines)
        self._started: list[Started | None] = [None] * len(engines)
        self._late: dict[int, float] = {}  # engines that were started (again) beside others, and when
        self._due = False
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: Exception | None = None
        self._closed = False

    # ---------------------------------------------------------------------------------------------------------- a life

    async def start(self) -> RolloutGroup:
        """Take the seats and start all engines; returns when they run.

        Raises:
            CapacityError: the cluster did not grant the fewest engines' seats in time; nothing stays reserved.
            ValueError, RuntimeError: an engine's own reason not to start.
            RolloutError: engines' processes died meanwhile, more often than is to be survived.
        """
        try:
            engines = await self._place()
            for engine, started in zip(engines, await asyncio.gather(*map(self._first, engines)), strict=True):
                self._run(engine, started)
        except BaseException:
            await self.close()
            raise
        return self

    async def _place(self) -> list[int]:
        """The engines that have seats."""
        fewest, seats = self.bounds[0], self._seats
        waits_s = [self._wait_s if e < fewest else min(self._wait_s, GRANT_S) for e in range(len(self.configs))]
        taken = (seats.take(e, config, waits_s[e]) for e, config in enumerate(self.configs))
        granted = dict(enumerate(await asyncio.gather(*taken)))
        if sum(granted.values()) < fewest:
            raise CapacityError(
                f"the cluster granted {sum(granted.values())} of {fewest} engines their seats within "
                f"{self._wait_s:g} s; an engine wants {bundles(self.configs[0], seats.each)}: ask for fewer engines or "
                "less for each, or add nodes"
            )
        for engine in [engine for engine, has in granted.items() if not has]:
            self.fleet.left(engine, "there was no seat for it")
        return [engine for engine, has in granted.items() if has]

    async def _first(self, engine: int) -> Started:
        """Start an engine of the beginning; again where a process of its is killed meanwhile."""
        while True:
            try:
                return await self._launch(engine)
            except (RayActorError, GaveUp) as error:
                ray.kill(self._actors[engine])  # it may be another rank that died
                reason = f"it did not start: {_reason(error)}"
                log.warning("rollout engine %d failed: %s", engine, reason)
                self._event("failed", engine, reason=reason)
                if not self.fleet.failed(engine, reason):
                    raise RolloutError(f"rollout engine {engine} failed: {reason}") from None

    async def _launch(self, engine: int) -> Started:
        """Start the actor of an engine, and the engine in it."""
        config, berths = self.configs[engine], self._seats.berths(engine)
        options = self._seats.options(engine, config)
        actor = self._actors[engine] = RolloutEngine.options(**options, enable_task_events=False).remote()
        try:
            return await asyncio.wait_for(actor.start.remote(config, self._seats.each, self._start, berths), START_S)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, ValueError | RuntimeError) else error) from None
        except TimeoutError:
            raise RuntimeError(f"rollout engine {engine} did not start within {START_S:g} s") from None

    def _run(self, engine: int, started: Started) -> None:
        self._started[engine] = started
        self.fleet.started(engine, started.version)
        self._tell(engine)
        self._keep(self._attend(engine))
        self._dispatch_soon()

    async def _attend(self, engine: int) -> None:
        """Hear what an engine has done until it fails or has left; then see to its requests, and start it again."""
        try:
            while self.fleet.states[engine].health is not Health.LEFT:
                self._deliver(engine, await self._collected(engine))
        except RayError as error:
            await self._replace(engine, _reason(error))
        except TimeoutError:
            await self._replace(engine, f"it did not answer within {self._timeout_s:g} s")

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Have this done beside all else."""
        self._tasks.append(asyncio.ensure_future(self._guarded(work)))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # nobody awaits this task: those who wait for answers must hear of it
            log.exception("the rollout group failed")
            # A trainer that could not bring an engine its weights is started again, and the engines with it.
            told = error if isinstance(error, WorkerError) else RolloutError(f"the rollout group failed: {error}")
            self._failure = self._failure or told
            self._requests.fail_all(told)

    async def _collected(self, engine: int) -> list[Done]:
        poll_s = min(POLL_S, self._timeout_s)
        news = self._actors[engine].collect.remote(poll_s, self._timeout_s)
        return await asyncio.wait_for(news, poll_s + self._timeout_s)

    async def _replace(self, engine: int, reason: str) -> None:
        stranded = await self._stranded(engine)
        if self.fleet.states[engine].health in (Health.LEAVING, Health.LEFT):
            self._gone(engine, reason)
            return
        log.warning("rollout engine %d failed: %s", engine, reason)
        self._event("failed", engine, reason=reason)
        if stranded:
            self.fleet.leaving(engine)
            self._gone(engine, f"its node is gone: {reason}")
            return
        self._late[engine] = time.monotonic()
        while True:
            again = self.fleet.failed(engine, reason)
            self._tell(engine)
            self._requeue(engine)
            ray.kill(self._actors[engine])
            if not again:
                self._seats.give_back(engine)
                break
            try:
                await self._turn.wait()
                if (started := await self._restarted(engine)) is None:
                    return
                await self._in_turn(engine)
            except (RayError, ValueError, RuntimeError) as error:
                if self.fleet.states[engine].health is Health.LEFT:
                    return
                reason = f"it did not start again: {_reason(error)}"
                continue
            await self._arrive(engine, started)
            return
        self._dispatch_soon()  # which says so to all that wait, if it was the last

    async def _restarted(self, engine: int) -> Started | None:
        """What was started; None where it has left instead, since its node turned out to be gone."""
        launching = asyncio.ensure_future(self._launch(engine))
        try:
            while not (await asyncio.wait((launching,), timeout=LOOK_S))[0]:
                if await self._stranded(engine):
                    self._gone(engine, "its node is gone", excused=bool(self.fleet.states[engine].reason))
                if self.fleet.states[engine].health is Health.LEFT:
                    return None
            return launching.result()
        finally:
            launching.cancel()

    async def _stranded(self, engine: int) -> bool:
        """Whether the engine is to leave since a node of its seats is gone; of a fixed number each is waited for."""
        if self.bounds[0] == self.bounds[1]:
            return False
        return not self._seats.nodes(engine) <= await asyncio.to_thread(living_nodes)

    async def _arrive(self, engine: int, started: Started) -> None:
        """An engine runs (again) beside others: bring it the weights in force."""
        self._run(engine, started)
        if engine in self.fleet.ready:
            self._joined(engine)
        elif engine in self.fleet.of(Health.STALE) and self.on_stale is not None:
            await self.on_stale(engine)

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
        self._requests.fail_all(RolloutError("the rollout group was closed"))
        actors = [actor for actor in self._actors if actor is not None]
        # One that is started (again) may wait for a seat that never comes, and has nothing to close.
        waiting = {e for e in self.fleet.of(Health.STARTING) if e in self._late}
        told = [actor for e, actor in enumerate(self._actors) if actor is not None and e not in waiting]
        closing = asyncio.gather(*(actor.close.remote() for actor in told), return_exceptions=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(closing, CLOSE_S)
        for actor in actors:
            ray.kill(actor)
        self._seats.close()

    async def __aenter__(self) -> RolloutGroup:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------------- engines come and go

    def grow(self, count: int, avoid: Collection[str] = ()) -> tuple[int, ...]:
        """Start `count` more engines beside those that run, none on a node in `avoid`; their numbers.

        Each is given requests once it has the weights in force. One that finds no seat has left again.
        """
        engines = []
        for _ in range(count):
            engines.append(engine := self.fleet.joining())
            self._requests.joining()
            self.configs.append(self.configs[0])
            self._actors.append(None)
            self._started.append(None)
            self._updating.append(0)
            self._late[engine] = time.monotonic()
            self._tell(engine)
            self._keep(self._join(engine, avoid))
        return tuple(engines)

    async def _join(self, engine: int, avoid: Collection[str]) -> None:
        if not await self._seats.take(engine, self.configs[engine], GRANT_S, avoid):
            self._gone(engine, "there was no seat for it")
            return
        try:
            started = await self._restarted(engine)
        except (RayError, ValueError, RuntimeError) as error:
            if self.fleet.states[engine].health is not Health.LEFT:
                self._event("failed", engine, reason=f"it did not start: {_reason(error)}")
                if self.fleet.failed(engine, _reason(error)):
                    self._gone(engine, "it did not start")
                else:
                    self._seats.give_back(engine)
                self._dispatch_soon()
            return
        if started is not None:
            await self._arrive(engine, started)

    def retire(self, engine: int, reason: str, within_s: float) -> None:
        """Have an engine leave: it is given nothing more, finishes what it has, and gives its seats back.

        What it has not finished within `within_s` seconds others answer, from the start.
        """
        if self.fleet.states[engine].health is Health.STARTING:
            self._gone(engine, reason)
            return
        self.fleet.leaving(engine)
        self._keep(self._finish(engine, reason, within_s))

    async def _finish(self, engine: int, reason: str, within_s: float) -> None:
        self._tell(engine)
        await self._requests.emptied(engine, within_s)
        self._gone(engine, reason)

    def _gone(self, engine: int, reason: str, excused: bool = False) -> None:
        """An engine has left; others answer what it had. excused: its last failure was not its own."""
        if self.fleet.states[engine].health is Health.LEFT:
            return
        self.fleet.left(engine, reason, excused)
        moved = self._requeue(engine, blame=False)
        if self._actors[engine] is not None:
            ray.kill(self._actors[engine])
        self._seats.give_back(engine)
        self._tell(engine)
        self._event("left", engine, reason=reason, moved=moved, ran=self._started[engine] is not None)
        self._dispatch_soon()

    def _joined(self, engine: int) -> None:
        if (since := self._late.pop(engine, None)) is not None:
            state, seconds = self.fleet.states[engine], round(time.monotonic() - since, 3)
            self._event("joined", engine, node=self.node(engine), version=state.version, seconds=seconds)

    def _event(self, event: str, engine: int, **what: Any) -> None:
        if self.on_event is not None:
            self.on_event(event, engine=engine, **what)

    def nodes(self, engine: int) -> frozenset[str]:
        """Ids of the nodes that an engine's own seats are on; none while it has none."""
        return self._seats.nodes(engine)

    def outstanding(self, engine: int) -> int:
        """Tokens that an engine has to compute at most."""
        return self._requests.outstanding(engine)

    @property
    def needs(self) -> list[dict[str, float]]:
        """What another engine reserves, each bundle on one node."""
        return bundles(self.configs[0], self._seats.each)

    def members(self) -> list[dict[str, Any]]:
        """JSON-ready: of each engine that is there or on its way, what is known of it and what it has to do."""
        found = []
        requests = self._requests.counts()
        for engine in self.fleet.of(Health.STARTING, Health.STALE, Health.READY, Health.LEAVING):
            state, started = self.fleet.states[engine], self._started[engine]
            runs = state.health is not Health.STARTING and started is not None
            where = {"node": started.node, "host": started.host, "pid": started.pid} if runs else {}
            work = {"outstanding_tokens": self.outstanding(engine), "requests": requests[engine]}
            found.append({"engine": engine, "state": str(state.health), "version": state.version, **where, **work})
        return found

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
        pending = self._requests.add(token_ids, params, group)
        self._dispatch_soon()
        try:
            return await pending.future
        except asyncio.CancelledError:
            if (engine := self._requests.forget(pending)) is not None:
                self._actors[engine].abort.remote([pending.request.id])
                self._tell(engine)
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
            self._requests.fail_waiting(RolloutError(f"no engine is left to answer ({why})"))
        ready = self.fleet.ready
        if not ready or not self._turn.is_set():
            return  # they wait for an engine that starts, for its weights, or for its turn
        for engine, requests in self._requests.batches(ready).items():
            self._actors[engine].submit.remote(requests)
            self._tell(engine)

    def _deliver(self, engine: int, done: Sequence[Done]) -> None:
        self._requests.deliver(engine, done)
        self._tell(engine)

    def _requeue(self, engine: int, blame: bool = True) -> int:
        """Have others answer what an engine had, which has failed (blame) or left; how much that was."""
        moved = self._requests.requeue(engine, self.fleet.states[engine].reason, blame)
        self._dispatch_soon()
        return moved

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
        if engine in self.fleet.ready:
            self._joined(engine)
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
            working = "generating" if self.outstanding(engine) else "idle"
            what = "updating" if self._updating[engine] else working
            others = {Health.LOST: "lost", Health.LEFT: "idle", Health.LEAVING: working}
            self.on_state(engine, what if self._runs(engine) else others.get(health, "restarting"))

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
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
