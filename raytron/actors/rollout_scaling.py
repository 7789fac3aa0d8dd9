"""Keeps the number of an RL run's engines what the cluster and the user let it be, and tells of them.

A look a second, on the run's event loop: what is free, what drains, what was asked for -> rollout_policy.decide -> the
group's `grow` and `retire`; and the autoscaler is asked for room for everybody. Every decision is in the run's journal
with its reason, and so is every engine that failed, joined or left. Nobody waits for any of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from raytron.actors.control import Control
from raytron.actors.fleet import Health
from raytron.actors.members import draining
from raytron.actors.placement import Node, cluster
from raytron.actors.rollout import RolloutGroup
from raytron.actors.rollout_policy import EnginesDecision, EnginesState, Seated, decide, refusal, wanted
from raytron.actors.rollout_seats import engines_that_fit

__all__ = ["EngineScaler"]

log = logging.getLogger(__name__)

LOOK_S = 1.0
AGAIN_S = 10.0  # before another engine is started, after one found no seat or did not come up


class EngineScaler:
    """Looks after `group` inside its `async with`.

    Args:
        group: started. One that shares seats of a trainer is told of, and stays as it is.
        control: of the run.
        others: bundles of what the run has besides engines; an autoscaler is asked for room for everything together.
    """

    def __init__(self, group: RolloutGroup, control: Control, others: Sequence[Mapping[str, float]] = ()) -> None:
        self._group, self._control, self._others = group, control, others
        self._again_s = float("-inf")
        self._told: set[str] = set()

    async def __aenter__(self) -> EngineScaler:
        self._group.on_event = self._heard
        self._looking = asyncio.ensure_future(self._run())
        self._looking.add_done_callback(_complain)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)
        self._group.on_event = None
        await self._tell(last=True)

    async def _run(self) -> None:
        while True:
            try:
                self._take_requests()
                if not self._group.shares:
                    await self._look()
                await self._tell()
            except RayError as error:  # the cluster is busy with what has just happened to it
                log.warning("while looking after the engines: %s", error)
            await asyncio.sleep(LOOK_S)

    async def _tell(self, last: bool = False) -> None:
        self._control.engines(self._group.members())
        await asyncio.to_thread(self._control.visit, last)

    def _take_requests(self) -> None:
        for asked in self._control.requests():
            if (engines := asked.get("engines")) is None:
                why = "the trainer of an RL run keeps its size and shape while it runs; --engines changes its engines"
            else:
                why = refusal(self._group.bounds, engines)
            self._control.answer(asked, why)

    async def _look(self) -> None:
        nodes, leaving = await asyncio.gather(asyncio.to_thread(cluster), asyncio.to_thread(draining))
        state = self._state(nodes, leaving)
        self._warn(state)
        engines = wanted(state)
        self._control.want([*self._others, *self._group.needs * engines], engines=engines)
        decision = decide(state)
        if decision.kind == "continue":
            return
        self._control.note(
            "decided", action=decision.kind, start=decision.start, leave=decision.leave, reason=decision.reason
        )
        self._carry_out(decision, leaving)

    def _carry_out(self, decision: EnginesDecision, leaving: Mapping[str, float]) -> None:
        for engine in decision.leave:
            self._group.retire(engine, decision.reason, decision.within_s)
        self._group.grow(decision.start, leaving.keys())

    def _state(self, nodes: Sequence[Node], leaving: Mapping[str, float]) -> EnginesState:
        group, fleet, now = self._group, self._group.fleet, time.time()
        ready = set(fleet.ready)
        engines = tuple(Seated(e, group.nodes(e), e in ready, group.outstanding(e)) for e in fleet.present)
        stays = [node for node in nodes if node.id not in leaving]
        free = engines_that_fit(stays, group.needs, group.bounds[1])
        return EnginesState(
            engines=engines,
            bounds=group.bounds,
            free=free - sum(not one.nodes for one in engines),
            draining={node: until - now for node, until in leaving.items()},
            requested=self._control.wish.get("engines"),
            lost=len(fleet.of(Health.LOST)),
            held_s=self._again_s - time.monotonic(),
        )

    def _warn(self, state: EnginesState) -> None:
        """Say once what the run will not say by itself."""
        for one in state.engines:
            for node in one.nodes & state.draining.keys() - self._told:
                self._told.add(node)
                self._control.note("drain", what=f"node {node[:8]} is to leave")
        if state.engines or state.free > 0:
            self._told.discard("none")
        elif "none" not in self._told:
            self._told.add("none")
            self._control.note("no engines", what="no engine is left and there is no room for one: waiting for nodes")

    def _heard(self, event: str, **what: Any) -> None:
        if event == "left" and not what["ran"]:
            self._again_s = time.monotonic() + AGAIN_S
        self._control.note(f"engine {event}", **what)


def _complain(looking: asyncio.Task[None]) -> None:
    """The run goes on with the engines it has."""
    if not looking.cancelled() and (error := looking.exception()) is not None:
        log.error("the number of engines changes no more", exc_info=error)
