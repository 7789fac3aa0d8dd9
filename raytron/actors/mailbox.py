"""How a live run is talked to from another process: a small named actor that holds its status and takes requests.

It lives in the fixed namespace `NAMESPACE` under the run's name, on the node of the run's driver, with which it ends,
and which visits it about once a second. The class is sent to Ray by value: its process needs neither torch nor this
package, starts in a second and stays small. The alternative, a socket in the driver, would need an address, a protocol
and a key of its own.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["NAMESPACE", "find_mailbox", "open_mailbox"]

NAMESPACE = "raytron"
LEAVING_S = 10.0  # the mailbox of a driver that was killed may be there for so long


def _mailbox_class() -> type:
    class Mailbox:
        """Requests go in at one side and are taken out at the other; answers and the status go the other way."""

        def __init__(self) -> None:
            self.state: dict[str, Any] = {}
            self.requests: list[dict[str, Any]] = []
            self.answers: dict[int, str] = {}
            self.count = 0

        def ask(self, request: dict[str, Any]) -> int:
            """Leave a request; its number, by which its answer is found."""
            self.count += 1
            self.requests.append({**request, "number": self.count})
            return self.count

        def answer(self, number: int) -> str | None:
            """What became of a request, once known."""
            return self.answers.get(number)

        def status(self) -> dict[str, Any]:
            """The run's, as it was at the driver's last visit."""
            return self.state

        def visit(self, state: dict[str, Any], answers: dict[int, str]) -> list[dict[str, Any]]:
            """The driver's visit: it leaves its status and answers, and takes all requests."""
            self.state = state
            self.answers |= answers
            taken, self.requests = self.requests, []
            return taken

    return Mailbox


def open_mailbox(run: str) -> Any:
    """The run's mailbox, made by its driver, with which it ends.

    Raises:
        ValueError: a run of that name is alive in this cluster.
    """
    options = {"name": run, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1, "enable_task_events": False}
    # Anywhere else it would be lost, with what was asked, whenever its node goes.
    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    deadline = time.monotonic() + LEAVING_S
    while True:
        try:
            return ray.remote(_mailbox_class()).options(**options).remote()
        except ValueError as error:  # the name is taken, which Ray says in words about actors
            if time.monotonic() > deadline:
                raise ValueError(f"a run named {run!r} is alive in this cluster; choose another run.name") from error
            time.sleep(0.1)


def find_mailbox(run: str) -> Any:
    """The mailbox of a live run.

    Raises:
        ValueError: there is none in this cluster.
    """
    try:
        mailbox = ray.get_actor(run, namespace=NAMESPACE)
        ray.get(mailbox.status.remote())
    except (ValueError, RayActorError) as error:
        raise ValueError(f"no run named {run!r} is alive in this cluster") from error
    return mailbox
