"""A pretraining run on a cluster with an autoscaler; a script, since a process has one Ray.

    python -m tests.autoscaled FOLDER NAME

The cluster has one node when the run starts, on two ranks of four it would like to have. It grows as the autoscaler
adds the node it asks for; then the user wants two ranks, the node is taken away, and the run goes on for some steps.
FOLDER/asked.json then says what Ray's request was with four ranks, with two, and after the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from _drill import CPUS, LEAST, LOOK_S, PATIENCE_S, RANKS, Driven, Site

from raytron.actors import live
from raytron.actors.mailbox import find_mailbox
from raytron.actors.members import living_nodes
from raytron.actors.runs import write_json


def requested() -> list:
    """What the autoscaler reads."""
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "null")


def ranks(name: str) -> int:
    """How many the run has now; spares and leavers do not count."""
    return sum(rank["rank"] is not None for rank in live.status(find_mailbox(name))["ranks"])


def until(holds: Callable[[], bool]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("the run, or the autoscaler, does not get on")
        time.sleep(LOOK_S)


def follow(driven: Driven) -> list:
    """Wait for what the autoscaler does; what it was asked for."""
    until(lambda: driven.step() >= 3 and ranks(driven.name) == RANKS)
    asked = [requested()]
    live.ask(find_mailbox(driven.name), {"num_workers": LEAST})
    until(lambda: len(living_nodes()) == 2)  # the head, and a node with two ranks
    asked.append(requested())
    step = driven.step()
    until(lambda: driven.step() >= step + 3)
    assert ranks(driven.name) == LEAST
    driven.stop()
    return [*asked, requested()]


def main(folder: Path, name: str) -> None:
    """The run, and what becomes of it."""
    with Site(nodes=0) as site:
        command = [sys.executable, "-m", "tests.autoscaler", site.address, site.head, str(CPUS), "2"]
        autoscaler = subprocess.Popen(command)
        try:
            until(lambda: ray.cluster_resources().get("CPU", 0) == CPUS)
            driven = Driven(site, folder, name, {"pace_s": 0.02})
            try:
                write_json(folder / "asked.json", follow(driven))
            except BaseException:
                print(driven.said(), file=sys.stderr)
                raise
            finally:
                driven.end()
        finally:
            autoscaler.terminate()
            ended = autoscaler.wait()
    assert ended == 0, "the autoscaler may have left nodes over"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
