"""Which Ray a run uses, and what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from raytron.actors import Session
from raytron.actors.session import _usable

ROOT = Path(__file__).parents[2]
DRIVER = """
import sys, time
from raytron.actors import ActorGroup, Session
from raytron.parallel import Mesh
from tests.actors.engines import Toy
Session(2)
group = ActorGroup(Mesh(dp=2))
group.create(Toy)
group.submit("wait_for_all", ranks=[1])
print(*[where.pid for where in group.where], flush=True)
if sys.argv[1] == "raise":
    raise ValueError("the driver fails")
time.sleep(600)
"""
NODES = """
from ray.cluster_utils import Cluster
import ray, tempfile
from raytron.actors import ActorGroup
from raytron.parallel import Mesh
from tests.actors.engines import Toy
folder = tempfile.mkdtemp(prefix="rt-", dir="/tmp")
cluster = Cluster(True, head_node_args=dict(num_cpus=3, include_dashboard=False, temp_dir=folder))
cluster.add_node(num_cpus=5)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
mesh = Mesh(dp=3, tp=2)
with ActorGroup(mesh) as group:
    group.create(Toy)
    assert group.call("sum", 1) == [6] * 6
    nodes = [where.node for where in group.where]
    assert len(set(nodes)) == 2, nodes
    assert all(nodes[a] == nodes[b] for a, b in mesh.groups("tp")), nodes
with ActorGroup(Mesh(pp=3, tp=2)) as group:
    nodes = [where.node for where in group.where]
    assert nodes[0] == nodes[1] and nodes[2] == nodes[3] and nodes[4] == nodes[5], nodes
    assert nodes == sorted(nodes) or nodes == sorted(nodes, reverse=True), nodes
ray.shutdown()
cluster.shutdown()
print("ok")
"""


def test_a_run_joins_the_ray_it_is_connected_to_and_leaves_it_up(cluster: Session):
    assert cluster.owned
    with Session(1000) as inner:
        assert not inner.owned
    assert ray.is_initialized()
    assert ray.cluster_resources()["CPU"] == 8


def test_folders_too_deep_for_sockets_are_not_used(tmp_path):
    assert _usable("/tmp") or Path("/tmp/ray").owner() != Path.home().owner()
    assert not _usable("/" + "x" * 80)
    assert not _usable(str(tmp_path / "missing"))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raise", "kill"])
def test_no_rank_outlives_its_driver(end: str):
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, end], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    ) as driver:
        pids = driver.stdout.readline().split()
        assert len(pids) == 2
        if end == "kill":
            driver.kill()
        driver.wait(60)
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"ranks {alive} outlive their driver"
        time.sleep(0.1)


@pytest.mark.slow
def test_tp_groups_stay_on_their_node_of_a_real_cluster():
    done = subprocess.run([sys.executable, "-c", NODES], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.stdout.strip().endswith("ok"), done.stdout + done.stderr
