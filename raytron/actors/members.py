"""The processes of a group: who they are, where they sit, and what has become of them.

A member has a name for the life of its group ("actor-7"), which is its *place* in layouts: ranks are renumbered when a
group changes size, names are not. It sits on a share of a placement group's bundle, its chair; what it leaves, another
can take.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from raytron.actors.devices import Devices
from raytron.actors.failures import DIED, GONE, HUNG
from raytron.actors.placement import Placement, Seat
from raytron.actors.worker import Where

__all__ = ["Chair", "Member", "draining", "ended", "living_nodes", "ready", "survey"]

LOOK_S = 0.1  # how often to look again at what may have changed
SILENT_S = 5.0  # a living worker's control thread answers within this
REFUSAL_S = 0.2  # a host that is there refuses a connection within this


@dataclass(frozen=True)
class Chair:
    """A rank's share of the bundle that `seat` names, of `placement`."""

    placement: Placement
    seat: Seat

    @property
    def group(self) -> Any:
        """The placement group; while it stands, nobody else gets the chair."""
        return self.placement.groups[self.seat.group]

    @property
    def options(self) -> dict:
        """Ray's options of an actor that sits here."""
        return self.placement.options(self.seat.rank)


@dataclass(eq=False)
class Member:
    """One worker process of a group.

    Attributes:
        name: its place in layouts; no other member ever had it.
        worker: the actor.
        rank: in the group's mesh, None for one that sits beside it.
        where, devices: where it runs, and on which of the node's GPUs.
    """

    name: str
    worker: Any
    chair: Chair
    where: Where
    rank: int | None = None
    devices: Devices = field(default_factory=lambda: Devices((), None))

    def __str__(self) -> str:
        return self.name if self.rank is None else f"rank {self.rank} ({self.name})"


def living_nodes(doubted: Collection[str] = ()) -> frozenset[str]:
    """Ids of the nodes that Ray believes alive, without those of `doubted` whose raylet is not there any more: Ray
    declares a node dead after some health checks only (16 seconds with its defaults)."""
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    asked = [name for name in doubted if name in nodes]
    if not asked:
        return frozenset(nodes)
    where = [(nodes[name]["NodeManagerAddress"], nodes[name]["NodeManagerPort"]) for name in asked]
    with ThreadPoolExecutor(min(len(asked), 64)) as pool:
        gone = {name for name, refused in zip(asked, pool.map(refuses, where), strict=True) if refused}
    return frozenset(nodes.keys() - gone)


def refuses(address: tuple[str, int]) -> bool:
    """Whether the host says that nobody listens there. One that says nothing may only be far away: that is for Ray's
    own health checks to tell."""
    try:
        socket.create_connection(address, REFUSAL_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def draining() -> Mapping[str, float]:
    """Nodes that are to leave, by id, with the Unix time at which they will have (infinite where nobody has said)."""
    nodes = ray._private.state.state.get_draining_nodes()  # there is no public way to ask
    return {node: until / 1000 if until else float("inf") for node, until in nodes.items()}


def survey(
    members: Sequence[Member], patience_s: float = SILENT_S, gone: Collection[str] = frozenset()
) -> dict[str, str]:
    """Those of `members` that are lost, by name, and how: `DIED`, `GONE` or `HUNG`.

    Each is asked for a sign of life; who gives none within `patience_s` seconds has lost its node, or hangs. Whose
    process died may have lost its node too, and who is left on a lost node will not be for long.

    Args:
        gone: nodes that are known to be.
    """
    asked = {member.worker.where.remote(): member for member in members if member.where.node not in gone}
    lost = {member.name: GONE for member in members if member.where.node in gone}
    deadline = time.monotonic() + patience_s
    while asked:
        over = {ref: asked.pop(ref) for ref in ready(asked, LOOK_S)}
        died, late = [member for ref, member in over.items() if ended(ref)], time.monotonic() >= deadline
        living = living_nodes({member.where.node for member in (*died, *asked.values())})
        lost |= {member.name: DIED if member.where.node in living else GONE for member in died}
        for ref, member in list(asked.items()):
            if late or member.where.node not in living:
                lost[member.name] = HUNG if member.where.node in living else GONE
                del asked[ref]
    nodes = {member.where.node for member in members if lost.get(member.name) == GONE}
    return lost | {member.name: GONE for member in members if member.where.node in nodes}


def ended(ref: ray.ObjectRef) -> bool:
    """Whether a call that is over ended with its actor. Looks at the result, or Ray would print a failure."""
    try:
        ray.get(ref)
    except (RayActorError, ObjectLostError):
        return True
    except RayTaskError:
        return False
    return False


def ready(refs: Iterable[ray.ObjectRef], timeout_s: float, at_least: int | None = None) -> list[ray.ObjectRef]:
    """Those that are over once `at_least` so many are (by default all), or `timeout_s` seconds have passed."""
    refs = list(refs)
    if not refs:
        return []
    ray.wait(refs, num_returns=at_least or len(refs), timeout=timeout_s)
    return ray.wait(refs, num_returns=len(refs), timeout=0)[0]
