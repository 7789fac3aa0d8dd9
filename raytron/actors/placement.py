"""Where ranks sit: what to ask Ray for, and who gets which bundle.

A unit (one dense replica, pp x cp x tp ranks) is one placement group, because groups cannot be resized and the unit is
what a run gains and loses. Within it, the ranks of a tensor-parallel group share one bundle of tp times the resources:
a bundle never straddles nodes, so the TP group cannot either. One bundle per rank with STRICT_PACK says the same only
for units that fit a node; Ray has no strategy for "these four here, those four anywhere". A TP group is split into
bundles of one rank only where no node could ever hold it.

`choose` and `assign` are pure; `place` carries them out and turns a request that stays pending into an error.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytron.parallel.mesh import Mesh

__all__ = [
    "Berth",
    "CapacityError",
    "Node",
    "Placement",
    "Request",
    "Seat",
    "ask",
    "assign",
    "choose",
    "cluster",
    "newcomers",
    "place",
    "ranks_that_fit",
    "room",
    "shortage",
    "without",
]

log = logging.getLogger(__name__)

Resources = Mapping[str, float]
RETRY_S = 10.0  # how much longer to wait while there is room: Ray tries a group that it refused again by and by
NODE = "ray.io/node-id"  # the label with a node's id, which Ray gives every node


class CapacityError(ValueError):
    """The cluster cannot hold what was asked of it."""


@dataclass(frozen=True)
class Node:
    """A living node: its address, and its resources by Ray's names, in all and free now."""

    id: str
    address: str
    total: Resources
    available: Resources


@dataclass(frozen=True)
class Request:
    """One unit's placement group: a bundle for each `ranks_per_bundle` consecutive ranks."""

    bundles: tuple[Resources, ...]
    strategy: str
    ranks_per_bundle: int


@dataclass(frozen=True)
class Seat:
    """Where a rank sits: bundle `bundle` of placement group `group`, on node `node`."""

    rank: int
    group: int
    bundle: int
    node: str


@dataclass(frozen=True)
class Berth:
    """A rank's seat as another actor may share it, which reserves nothing there: the two take turns.

    gpu: id of the GPU that is used there. sharing: how many share the seats of that node.
    """

    group: PlacementGroup
    bundle: int
    node: str
    gpu: str | None = None
    sharing: int = 1

    def options(self) -> dict:
        """Ray's options of an actor that shares it."""
        return {
            "num_cpus": 0,
            "num_gpus": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.bundle),
        }


def room(free: Resources, each: Resources) -> int:
    """How many ranks that need `each` fit in `free`."""
    return min((int(free.get(name, 0) / need + 1e-9) for name, need in each.items() if need > 0), default=2**31)


def ranks_that_fit(nodes: Sequence[Node], each: Resources, tp: int = 1) -> int:
    """How many ranks that need `each` fit in what is free now; those of a tensor-parallel group share a node if any
    node could hold them."""
    if max((room(node.total, each) for node in nodes), default=0) < tp:
        tp = 1
    return sum(room(node.available, each) // tp * tp for node in nodes)


def without(nodes: Sequence[Node], bundles: Sequence[Resources]) -> tuple[Node, ...]:
    """The nodes as they are once `bundles` have found a place, the largest first and each on the first that holds it.

    One that fits nowhere takes nothing: whoever places it will say so.
    """
    free = [dict(node.available) for node in nodes]
    for bundle in sorted(bundles, key=lambda bundle: sorted(bundle.values()), reverse=True):
        if (there := next((one for one in free if room(one, bundle)), None)) is not None:
            for name, need in bundle.items():
                there[name] = there.get(name, 0) - need
    return tuple(replace(node, available=left) for node, left in zip(nodes, free, strict=True))


def choose(mesh: Mesh, each: Resources, nodes: Sequence[Node], strategy: str = "PACK") -> tuple[Request, ...]:
    """What to ask for: one request per unit, those that must fit one node first.

    Args:
        each: resources of one rank.
        strategy: with PACK, units that fit a node are bound to one (STRICT_PACK) and the others packed by TP groups;
            any other of Ray's strategies is used as it is for every unit.

    The choice follows what is free now, else what the nodes could hold when idle. A request that fits neither is still
    asked for, since an autoscaler may answer it.
    """
    if strategy != "PACK":
        return (_request(mesh, each, strategy, mesh.tp),) * mesh.dp
    for free in ([n.available for n in nodes], [n.total for n in nodes]):
        rooms = [room(f, each) for f in free]
        if sum(r // mesh.tp for r in rooms) * mesh.tp >= mesh.size:
            whole = min(mesh.dp, sum(r // mesh.unit for r in rooms))
            return (_request(mesh, each, "STRICT_PACK", mesh.tp),) * whole + (
                _request(mesh, each, "PACK", mesh.tp),
            ) * (mesh.dp - whole)
    rooms = [room(n.total, each) for n in nodes]
    if max(rooms, default=0) < mesh.tp and sum(rooms) >= mesh.size:  # no node holds a TP group, all together hold all
        return (_request(mesh, each, "PACK", 1),) * mesh.dp
    return (_request(mesh, each, "PACK", mesh.tp),) * mesh.dp


def newcomers(count: int, unit: Mesh, each: Resources, nodes: Sequence[Node]) -> Mesh:
    """What to ask for so that `count` ranks come to a mesh of such units: whole units if so many come, else
    tensor-parallel groups; single ranks where groups find no room and these do, beside who is there already."""
    if ranks_that_fit(nodes, each, unit.tp) < count <= ranks_that_fit(nodes, each):
        return Mesh(dp=count)
    if count % unit.size == 0:
        return replace(unit, dp=count // unit.size)
    return Mesh(dp=count // unit.tp, tp=unit.tp) if count % unit.tp == 0 else Mesh(dp=count)


def _request(mesh: Mesh, each: Resources, strategy: str, ranks: int) -> Request:
    bundle = {name: need * ranks for name, need in each.items() if need > 0}
    return Request((bundle,) * (mesh.unit // ranks), strategy, ranks)


def assign(
    requests: Sequence[Request], nodes_of: Sequence[Mapping[int, str]], nodes: Sequence[Node]
) -> tuple[Seat, ...]:
    """Ranks to bundles, in rank order.

    Args:
        nodes_of: for each request, the node id of each of its bundles.

    Bundles are sorted by node address before ranking, and units by their first node, so that neighbours on an axis are
    neighbours on the network whatever order Ray filled the bundles in.
    """
    place_of = {node.id: at for at, node in enumerate(sorted(nodes, key=_address))}
    orders = [sorted(where, key=lambda b, where=where: (place_of[where[b]], b)) for where in nodes_of]
    units = sorted(range(len(requests)), key=lambda u: ([place_of[nodes_of[u][b]] for b in orders[u]], u))
    seats = [
        (unit, bundle, nodes_of[unit][bundle])
        for unit in units
        for bundle in orders[unit]
        for _ in range(requests[unit].ranks_per_bundle)
    ]
    return tuple(Seat(rank, *seat) for rank, seat in enumerate(seats))


def _address(node: Node) -> tuple[int, int | str, str]:
    try:
        return (0, int(ipaddress.ip_address(node.address)), node.id)
    except ValueError:  # a host name
        return (1, node.address, node.id)


def shortage(mesh: Mesh, each: Resources, nodes: Sequence[Node], waited_s: float) -> str:
    """What was asked, what is there, and what to do about it."""
    free, idle = (sum(room(r, each) for r in pool) for pool in ([n.available for n in nodes], [n.total for n in nodes]))
    lines = [
        f"the cluster cannot hold {mesh.size} ranks of {_amounts(each)} each "
        f"(dp {mesh.dp} x pp {mesh.pp} x cp {mesh.cp} x tp {mesh.tp}; a TP group of {mesh.tp} shares a node): "
        f"it has room for {free} now, for {idle} when idle, after waiting {waited_s:.0f} s"
    ]
    for node in sorted(nodes, key=_address):
        have = ", ".join(f"{k} {node.available.get(k, 0):g} free of {node.total.get(k, 0):g}" for k in each)
        lines.append(f"  node {node.address} ({node.id[:8]}): {have}; room for {room(node.available, each)} ranks")
    lines.append(
        "ask for fewer ranks (scaling.num_workers) or less per rank (scaling.resources_per_worker), or add nodes"
    )
    return "\n".join(lines)


def _amounts(resources: Resources) -> str:
    return ", ".join(f"{name} {need:g}" for name, need in resources.items())


def cluster() -> tuple[Node, ...]:
    """The living nodes of the cluster this process is connected to."""
    # Free resources per node: the state API needs a dashboard, which a local run does not start.
    available = ray._private.state.available_resources_per_node()
    return tuple(
        Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"], available.get(n["NodeID"], {}))
        for n in ray.nodes()
        if n["Alive"]
    )


@dataclass(frozen=True)
class Placement:
    """Seats taken on the cluster; `remove` gives them back."""

    each: Resources
    groups: tuple[PlacementGroup, ...]
    seats: tuple[Seat, ...]

    def options(self, rank: int) -> dict:
        """Ray's actor options that put an actor on the seat of `rank`."""
        seat = self.seats[rank]
        custom = {k: v for k, v in self.each.items() if k not in ("CPU", "GPU", "memory")}
        return {
            "num_cpus": self.each.get("CPU", 0),
            "num_gpus": self.each.get("GPU", 0),
            "memory": self.each.get("memory"),
            "resources": custom or None,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.groups[seat.group], placement_group_bundle_index=seat.bundle
            ),
        }

    def remove(self) -> None:
        for group in self.groups:
            remove_placement_group(group)


def place(
    mesh: Mesh, each: Resources, *, strategy: str = "PACK", wait_s: float = 30.0, avoid: Collection[str] = ()
) -> Placement:
    """Take seats for every rank of `mesh`, `each` resources a rank, none of them on a node in `avoid` (ids).

    Raises:
        CapacityError: not all were granted within `wait_s` seconds, or there is room and they were not granted
            within RETRY_S more; nothing stays reserved.
    """
    start = time.monotonic()
    requests = choose(mesh, each, [node for node in cluster() if node.id not in avoid], strategy)
    if requests[0].ranks_per_bundle < mesh.tp:
        log.warning("no node can hold a TP group of %d ranks; tensor parallelism will cross nodes", mesh.tp)
    groups = tuple(ask(request, avoid) for request in requests)
    while pending := [at for at, group in enumerate(groups) if not group.wait(0)]:
        if groups[pending[0]].wait(1):
            continue
        nodes, waited_s = cluster(), time.monotonic() - start
        missing = sum(len(requests[at].bundles) * requests[at].ranks_per_bundle for at in pending)
        roomy = ranks_that_fit([node for node in nodes if node.id not in avoid], each, mesh.tp) >= missing
        if waited_s >= wait_s + (RETRY_S if roomy else 0.0):
            for group in groups:
                remove_placement_group(group)
            raise CapacityError(shortage(mesh, each, nodes, waited_s))
    nodes_of = [placement_group_table(group)["bundles_to_node_id"] for group in groups]
    return Placement(each, groups, assign(requests, nodes_of, cluster()))


def ask(request: Request, avoid: Collection[str]) -> PlacementGroup:
    """Ask for a placement group, none of whose bundles is to be on a node in `avoid` (ids)."""
    elsewhere = {NODE: f"!in({','.join(sorted(avoid))})"}
    selector = [elsewhere] * len(request.bundles) if avoid else None
    return placement_group(list(map(dict, request.bundles)), strategy=request.strategy, bundle_label_selector=selector)
