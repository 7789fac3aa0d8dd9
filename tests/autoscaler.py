"""Ray's own autoscaler, over nodes that are processes of this machine; a script, which ends them when it is ended.

    python -m tests.autoscaler GCS_ADDRESS HEAD_NODE_ID CPUS MOST

The real one, with the provider that Ray tests it with. Ray's `AutoscalingCluster` would do the same, and begins by
stopping every Ray of the machine.
"""

from __future__ import annotations

import os
import signal
import sys

CADENCE = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
IDLE_S = 3.0  # a node that nobody uses or asks for goes after this


def main(address: str, head: str, cpus: int, most: int) -> None:
    """At least one worker node of so many CPUs, and `most` at most."""
    from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG, Monitor

    worker = {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 1, "max_workers": most}
    provider = {"type": "fake_multinode", "gcs_address": address, "head_node_id": head, "launch_multiple": True}
    provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    config = BASE_READONLY_CONFIG | {
        "max_workers": most,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": provider,
        "available_node_types": BASE_READONLY_CONFIG["available_node_types"] | {"worker": worker},
    }
    monitor = Monitor(address, lambda: config)
    monitor._initialize_autoscaler()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        monitor._run()
    finally:
        for node in monitor.autoscaler.provider._nodes.values():  # its own way, SIGTERM, may take a minute
            if "node" in node:
                node["node"].kill_all_processes(check_alive=False, wait=True)


if __name__ == "__main__":
    os.environ.update(CADENCE)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
