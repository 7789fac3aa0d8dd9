"""The processes of a group: who they are, where they sit, and what has become of them.

A member has a name for the life of its group ("actor-7"), which is its *place* in layouts: ranks are renumbered when a
group changes size, names are not. It sits on a share of a placement group's bundle, its chair; what it leaves, another
can take.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from raytron.actors.devices import Devices
from raytron.actors.failures import DIED, GONE, HUNG
from raytron.actors.placement import Placement, Seat
from raytron.actors.worker import Where

__all__ = ["Chair", "Member", "draining", "ended", "frozen_nodes", "living_nodes", "ready", "survey"]

LOOK_S = 0.1  # how often to look again at what may have changed
SILENT_S = 5.0  # a living worker's control thread answers within this
REFUSAL_S = 0.2  # a host that is there refuses a connection within this
GREETING_S = 3.0  # a raylet that runs at all greets within this
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # how gRPC's clients begin (RFC 9113)


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
    living = _believed_alive()
    return frozenset(living) - _found({name: living[name] for name in doubted if name in living}, refuses)


def frozen_nodes(nodes: Collection[str]) -> frozenset[str]:
    """Those of `nodes` that Ray believes alive and whose raylet says nothing: to be asked where a process is silent
    already. This process's own node is never among them: it runs, if only slowly."""
    living, here = _believed_alive(), ray.get_runtime_context().get_node_id()
    return _found({name: living[name] for name in nodes if name in living and name != here}, stands_still)


def _believed_alive() -> Mapping[str, tuple[str, int]]:
    """Addresses of the raylets of the nodes that Ray believes alive, by id."""
    return {n["NodeID"]: (n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes() if n["Alive"]}


def _found(raylets: Mapping[str, tuple[str, int]], test: Callable[[tuple[str, int]], bool]) -> frozenset[str]:
    """The nodes whose raylet's address passes the test."""
    if not raylets:
        return frozenset()
    with ThreadPoolExecutor(min(len(raylets), 64)) as pool:
        return frozenset(name for name, yes in zip(raylets, pool.map(test, raylets.values()), strict=True) if yes)


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


def stands_still(address: tuple[str, int]) -> bool:
    """Whether a raylet that is greeted says nothing. A stopped process still takes connections; gRPC's own health check
    would need its library here."""
    try:
        with socket.create_connection(address, GREETING_S) as link:
            link.sendall(HELLO)
            link.recv(1)
    except TimeoutError:
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

    Each is asked for a sign of life; who gives none within `patience_s` seconds has lost its node (which may also stand
    still as a whole), or hangs. Whose process died may have lost its node too, and who is left on a lost node will not
    be for long.

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
        if late:
            living -= frozen_nodes({member.where.node for member in asked.values()})
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
