"""One replica's engine: rank 0 in this process, the other ranks in actors of the placement group it runs in.

Rank 0 schedules, so it sits where requests arrive; the others follow it until it closes. They are `Worker` actors, so
they are given seats and devices as training ranks are, but the group is not an `ActorGroup`: that one is driven from
outside, and a serving replica that loses a rank is not regrouped; it fails as a whole and is replaced as a whole, which
is what Ray Serve does. A rank that dies releases rank 0 from waiting for it at once, and ranks whose rank 0 is gone end
with it, since Ray ends the actors of a dead owner.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytron.actors.devices import Devices, share
from raytron.actors.placement import Berth
from raytron.actors.worker import Worker, cores
from raytron.config import EngineConfig
from raytron.inference import Engine, NativeEngine, Stats, make_engine
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh

__all__ = ["ReplicaEngine", "berths_for", "bundles", "start_engine"]

log = logging.getLogger(__name__)

FOREVER = 10 * 365 * 86400.0  # seconds an engine may wait for its next request
START_S = 300.0  # for the other ranks to start and to read their weights


def bundles(config: EngineConfig, each: Mapping[str, float]) -> list[dict[str, float]]:
    """A replica's placement group: a bundle for each tensor-parallel group, so that none straddles nodes.

    vLLM runs its ranks itself, beside rank 0: one bundle.
    """
    groups = 1 if config.engine == "vllm" else config.pp
    return [{name: need * config.tp * config.pp / groups for name, need in each.items() if need > 0}] * groups


def berths_for(engines: Sequence[EngineConfig], beside: Sequence[Berth]) -> list[tuple[Berth, ...]]:
    """The seats that each engine shares, none where it has its own. ValueError where they do not suffice."""
    ends = list(itertools.accumulate((config.tp * config.pp for config in engines), initial=0))
    if not beside:
        return [()] * len(engines)
    if ends[-1] > len(beside):
        raise ValueError(
            f"{len(engines)} engines of {ends[-1]} ranks in all cannot share the seats of {len(beside)}; ask for fewer "
            "engines, or for smaller ones"
        )
    count = Counter(berth.node for berth in beside[: ends[-1]])
    seats = [replace(berth, sharing=count[berth.node]) for berth in beside[: ends[-1]]]
    found = [tuple(seats[start:end]) for start, end in itertools.pairwise(ends)]
    for config, mine in zip(engines, found, strict=True):
        if config.engine == "vllm" and len({berth.node for berth in mine}) > 1:
            raise ValueError(
                "vLLM has all ranks of an engine on one node, and the trainer ranks whose seats it would share are on "
                "several; set engine.tp and pp to ranks of one node"
            )
    return found


def start_engine(config: EngineConfig, each: Mapping[str, float], berths: Sequence[Berth] = ()) -> Engine:
    """The engine of a replica, in the process and placement group that this is called in.

    berths: seats of others that its ranks share, instead of having `each` to themselves.

    Raises:
        ValueError: as `make_engine`.
        RuntimeError: a rank did not start.
    """
    if berths:
        config = _occupied(config, berths)
    if config.engine == "vllm":
        return make_engine(config)
    if config.tp * config.pp == 1:
        gpus = [berth.gpu for berth in berths if berth.gpu is not None] if berths else _granted()
        return NativeEngine(config, World.single(share([("", tuple(gpus))])[0].name))
    return ReplicaEngine(config, each, berths)


def _granted() -> list[str]:
    """Ids of the GPUs that Ray has granted this process."""
    return list(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", [])))


def _occupied(config: EngineConfig, berths: Sequence[Berth]) -> EngineConfig:
    """The configuration on seats of others, whose GPUs it is to use, and at its turn all of their node's cores."""
    here = [berth for berth in berths if berth.node == berths[0].node]
    if gpus := [berth.gpu for berth in here if berth.gpu is not None]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(gpus))
    return replace(config, threads=config.threads or max(1, cores() // berths[0].sharing))


class ReplicaEngine(NativeEngine):
    """Rank 0 of an engine whose other ranks are actors.

    Args:
        each: resources of one rank, by Ray's names.
        berths: see `start_engine`.
    """

    def __init__(self, config: EngineConfig, each: Mapping[str, float], berths: Sequence[Berth] = ()) -> None:
        self._followers = _Followers(config, each, berths)
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

    def __init__(self, config: EngineConfig, each: Mapping[str, float], berths: Sequence[Berth]) -> None:
        self._config, self._mesh = config, Mesh(tp=config.tp, pp=config.pp)
        self._threads = config.threads or max(1, int(each.get("CPU", 1)))
        self._berths = berths
        self._following: list[ray.ObjectRef] = []
        self._ended = False
        self._workers = [
            Worker.options(
                **(berths[rank].options() if berths else _seat(each, rank // config.tp)), enable_task_events=False
            ).remote(rank)
            for rank in range(1, self._mesh.size)
        ]

    def meet(self) -> World:
        """Share out devices and threads, and connect; rank 0's seat."""
        where = ray.get([worker.where.remote() for worker in self._workers], timeout=START_S)
        me = ray.get_runtime_context()
        mine = (me.get_node_id(), tuple(_granted()))
        seats = [mine, *((w.node, w.gpus) for w in where)]
        if self._berths:
            seats = [(berth.node, (berth.gpu,) if berth.gpu is not None else ()) for berth in self._berths]
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
