"""A pretraining run on a cluster with an autoscaler; a script, as drill.py is, whose run and ways it shares.

    python -m tests.autoscaled FOLDER NAME

The cluster has one node when the run starts, on two ranks of four it would like to have. It grows as the autoscaler
adds the node it asks for; then the user wants two ranks, the node is taken away, and the run goes on for some steps.
FOLDER/asked.json then says what Ray's request was with four ranks, with two, and after the run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get

from raytron import pretrain
from raytron.actors.members import living_nodes
from raytron.actors.runs import write_json
from raytron.actors.session import LOCAL
from tests.drill import CPUS, Drill, config


class Autoscaled(Drill):
    """Waits for what the autoscaler does."""

    def run(self) -> None:
        try:
            self.seen = self.follow()
        except Exception as error:
            self.error = error
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def follow(self) -> list:
        self._until(lambda: self._step() >= 3 and len(self._ranks()) == 4)
        with_four = requested()
        self.scale_down()
        self._until(lambda: len(living_nodes()) == 2)  # the head, and a node with two ranks
        step = self._step()
        self._until(lambda: self._step() >= step + 3)
        assert len(self._ranks()) == 2
        return [with_four, requested()]


def requested() -> list:
    """What the autoscaler reads."""
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "null")


def main(folder: Path, name: str) -> None:
    """The run, and what becomes of it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    root = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # pytest's own folders are too deep for sockets
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": root, "_system_config": LOCAL}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    drill = Autoscaled(cluster, folder, name, [], 0)
    command = [sys.executable, "-m", "tests.autoscaler", cluster.address, cluster.head_node.node_id, str(CPUS), "2"]
    autoscaler = subprocess.Popen(command)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        drill._until(lambda: ray.cluster_resources().get("CPU", 0) == CPUS)
        threading.Thread(target=drill.run, daemon=True).start()
        pretrain.run(config(folder, name))
        if drill.error is not None:
            raise drill.error
        write_json(folder / "asked.json", [*drill.seen, requested()])
    finally:
        ray.shutdown()
        autoscaler.terminate()
        ended = autoscaler.wait()
        cluster.shutdown()
        shutil.rmtree(root, ignore_errors=True)
    assert ended == 0, "the autoscaler may have left nodes over"
    if left := drill.left_over():
        raise RuntimeError(f"processes {left} are left over")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
