"""One replica's engine: rank 0 in this process, the other ranks in actors of the placement group it runs in.

Rank 0 schedules, so it sits where requests arrive; the others follow it until it closes. They are `Worker` actors, so
they are given seats and devices as training ranks are, but the group is not an `ActorGroup`: that one is driven from
outside, and a serving replica that loses a rank is not regrouped; it fails as a whole and is replaced as a whole, which
is what Ray Serve does. A rank that dies releases rank 0 from waiting for it at once, and ranks whose rank 0 is gone end
with it, since Ray ends the actors of a dead owner.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytron.actors.devices import Devices, share
from raytron.actors.worker import Worker
from raytron.config import EngineConfig
from raytron.inference import Engine, NativeEngine, Stats, make_engine
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh

__all__ = ["ReplicaEngine", "bundles", "start_engine"]

log = logging.getLogger(__name__)

FOREVER = 10 * 365 * 86400.0  # seconds an engine may wait for its next request
START_S = 300.0  # for the other ranks to start and to read their weights


def bundles(config: EngineConfig, each: Mapping[str, float]) -> list[dict[str, float]]:
    """A replica's placement group: a bundle for each tensor-parallel group, so that none straddles nodes.

    vLLM runs its ranks itself, beside rank 0: one bundle.
    """
    groups = 1 if config.engine == "vllm" else config.pp
    return [{name: need * config.tp * config.pp / groups for name, need in each.items() if need > 0}] * groups


def start_engine(config: EngineConfig, each: Mapping[str, float]) -> Engine:
    """The engine of a replica, in the process and placement group that this is called in.

    Raises:
        ValueError: as `make_engine`.
        RuntimeError: a rank did not start.
    """
    if config.engine == "vllm":
        return make_engine(config)
    if config.tp * config.pp == 1:
        seat = ("", tuple(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", []))))
        return NativeEngine(config, World.single(share([seat])[0].name))
    return ReplicaEngine(config, each)


class ReplicaEngine(NativeEngine):
    """Rank 0 of an engine whose other ranks are actors.

    Args:
        each: resources of one rank, by Ray's names.
    """

    def __init__(self, config: EngineConfig, each: Mapping[str, float]) -> None:
        self._followers = _Followers(config, each)
        try:
            world = self._followers.meet()
            self._followers.follow(world)
            super().__init__(config, world)
        except BaseException:
            self._followers.end()
            raise

    def stats(self) -> Stats:
        """See `Engine.stats`; a rank that has died is told of even while nothing runs."""
        stats, failure = super().stats(), self._followers.failure
        return replace(stats, health=f"failed: {failure}") if failure else stats

    def close(self) -> None:
        """See `Engine.close`."""
        if not self._closed:
            try:
                super().close()
            finally:
                self._followers.end()


class _Followers:
    """Actors for ranks 1 and up of a replica.

    Attributes:
        failure: why one of them is gone, once one is.
    """

    failure = ""

    def __init__(self, config: EngineConfig, each: Mapping[str, float]) -> None:
        self._config, self._mesh = config, Mesh(tp=config.tp, pp=config.pp)
        self._threads = config.threads or max(1, int(each.get("CPU", 1)))
        self._following: list[ray.ObjectRef] = []
        self._ended = False
        self._workers = [
            Worker.options(**_seat(each, rank // config.tp), enable_task_events=False).remote(rank)
            for rank in range(1, self._mesh.size)
        ]

    def meet(self) -> World:
        """Share out devices and threads, and connect; rank 0's seat."""
        where = ray.get([worker.where.remote() for worker in self._workers], timeout=START_S)
        me = ray.get_runtime_context()
        mine = (me.get_node_id(), tuple(map(str, me.get_accelerator_ids().get("GPU", []))))
        seats = [mine, *((w.node, w.gpus) for w in where)]
        devices = share(seats)
        nodes = [node for node, _ in seats]
        self._prepare(devices, nodes)
        host = ray.util.get_node_ip_address()
        store = dist.TCPStore("0.0.0.0", 0, None, True, wait_for_workers=False)
        refs = [
            worker.connect.remote(self._mesh, rank, (host, store.port), 0, FOREVER, devices[rank].name)
            for rank, worker in enumerate(self._workers, 1)
        ]
        # A rendezvous cannot be abandoned, and every worker has answered already: none can be missing from it.
        world = World(self._mesh, 0, store, device=devices[0].name, timeout=FOREVER, prefix="gen0")
        ray.get(refs, timeout=START_S)
        return world

    def _prepare(self, devices: tuple[Devices, ...], nodes: list[str]) -> None:
        if devices[0].visible:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[0].visible)
        torch.set_num_threads(self._threads)
        ray.get(
            [
                worker.prepare.remote({}, devices[rank].visible, self._threads, nodes.count(nodes[rank]))
                for rank, worker in enumerate(self._workers, 1)
            ],
            timeout=START_S,
        )

    def follow(self, world: World) -> None:
        """Have every rank read its part of the model and follow; one that ends releases rank 0 from waiting for it."""
        for worker in self._workers:
            made = worker.create.remote(_make, self._config)
            self._following += [made, worker.call.remote("follow")]
        threading.Thread(target=self._watch, args=(world,), daemon=True, name="raytron-followers").start()

    def _watch(self, world: World) -> None:
        waiting = list(self._following)
        while waiting and not self._ended:
            ready, waiting = ray.wait(waiting, timeout=1.0)
            for ref in ready:
                if reason := _failure(ref):
                    self.failure = f"a rank failed: {reason}"
                    log.error("%s", self.failure)
                    world.give_up(self.failure)
                    return

    def end(self) -> None:
        """End the processes."""
        self._ended = True
        for worker in self._workers:
            ray.kill(worker)


def _make(world: World, config: EngineConfig) -> NativeEngine:
    return NativeEngine(config, world)


def _seat(each: Mapping[str, float], bundle: int) -> dict[str, Any]:
    """Actor options for a rank in that bundle of the placement group this process runs in."""
    group = ray.util.get_current_placement_group()
    assert group is not None, "a replica of several ranks runs in a placement group"
    custom = {name: need for name, need in each.items() if name not in ("CPU", "GPU", "memory")}
    return {
        "num_cpus": each.get("CPU", 0),
        "num_gpus": each.get("GPU", 0),
        "memory": each.get("memory"),
        "resources": custom or None,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
    }


def _failure(ref: ray.ObjectRef) -> str:
    """Why the call failed, in one line, or nothing."""
    try:
        ray.get(ref)
    except RayError as error:
        return str(error).strip().splitlines()[-1]
    return ""
