"""Seats of rollout engines: each has a placement group of its own, or shares seats of a trainer's ranks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytron.actors.placement import Berth, Node, Request, ask, room
from raytron.actors.replica import bundles
from raytron.config import EngineConfig

__all__ = ["EngineSeats", "engines_that_fit"]

LOOK_S = 0.1  # how often to look whether seats were granted


def engines_that_fit(nodes: Sequence[Node], needs: Sequence[Mapping[str, float]], most: int) -> int:
    """How many engines find room in what is free now, `most` at most; `needs` are one engine's bundles."""
    free = [dict(node.available) for node in nodes]
    for count in range(most):
        for need in needs:
            if (there := next((one for one in free if room(one, need)), None)) is None:
                return count
            for name, amount in need.items():
                there[name] = there.get(name, 0) - amount
    return most


class EngineSeats:
    """Takes seats and gives them back.

    Args:
        each: resources of one rank, by Ray's names.
        berths: of each engine the seats it shares, none where it has its own.
    """

    def __init__(self, each: Mapping[str, float], berths: Sequence[tuple[Berth, ...]]) -> None:
        self.each, self._berths = dict(each), dict(enumerate(berths))
        self._groups: dict[int, PlacementGroup] = {}
        self._nodes: dict[int, frozenset[str]] = {}

    def berths(self, engine: int) -> tuple[Berth, ...]:
        """The seats that an engine shares."""
        return self._berths.get(engine, ())

    def nodes(self, engine: int) -> frozenset[str]:
        """Ids of the nodes its own seats were granted on; none while they are not."""
        return self._nodes.get(engine, frozenset())

    async def take(self, engine: int, config: EngineConfig, wait_s: float, avoid: Collection[str] = ()) -> bool:
        """Take an engine's seats, none of them on a node in `avoid`; whether they were granted within `wait_s`.

        Otherwise nothing stays reserved.
        """
        if self.berths(engine):
            return True
        group = self._groups[engine] = ask(Request(tuple(bundles(config, self.each)), "PACK", config.tp), avoid)
        start = time.monotonic()
        while not await asyncio.to_thread(_granted, group):
            if self._groups.get(engine) is not group:  # given back meanwhile
                return False
            if time.monotonic() - start > wait_s:
                self.give_back(engine)
                return False
            await asyncio.sleep(LOOK_S)
        table = await asyncio.to_thread(placement_group_table, group)
        self._nodes[engine] = frozenset(table["bundles_to_node_id"].values())
        return self._groups.get(engine) is group

    def options(self, engine: int, config: EngineConfig) -> dict[str, Any]:
        """Ray's options of an engine's actor, on its seats."""
        if berths := self.berths(engine):
            return berths[0].options()
        # An engine of one process per rank has rank 0 here; vLLM runs its ranks itself.
        mine = bundles(config, self.each)[0] if config.engine == "vllm" else self.each
        custom = {name: need for name, need in mine.items() if name not in ("CPU", "GPU", "memory")}
        return {
            "num_cpus": mine.get("CPU", 0),
            "num_gpus": mine.get("GPU", 0),
            "memory": mine.get("memory"),
            "resources": custom or None,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._groups[engine], 0),
        }

    def give_back(self, engine: int) -> None:
        """Reserve nothing for an engine any more."""
        self._nodes.pop(engine, None)
        if (group := self._groups.pop(engine, None)) is not None:
            remove_placement_group(group)

    def close(self) -> None:
        """Give everything back."""
        for engine in list(self._groups):
            self.give_back(engine)


def _granted(group: PlacementGroup) -> bool:
    try:
        return group.wait(0)
    except Exception:  # Ray's way to say that it was removed meanwhile
        return False
