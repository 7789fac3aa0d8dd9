"""Serving on a cluster whose nodes come and go: `python -m tests.serving.node_loss MODEL` says "ok" at its end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raytron.config import EngineConfig, ReplicaConfig, ServeConfig
from raytron.serving.app import App, ServedModel, run
from tests.serving.clients import Flood, body, pids, stats, until

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _drill import Site

TOKENS = 200


def replicas(site: Site) -> dict[str, list[int]]:
    """Node -> processes of the replicas there; nodes that are to leave stand in it too."""
    found = set(pids("engine-0-tiny"))
    return {node: sorted(found.intersection(site.processes(node))) for node in {*site.nodes, *site.leaving}}


def answered_during(app: App, deed: Callable[[], None]) -> int:
    """Requests are asked, some at a time, until the deed is done; how many. Each must be answered in full."""
    done = threading.Event()

    async def ask() -> list:
        flood, answers = Flood(app), []
        while not done.is_set():
            asked = [body("tiny", f"request {len(answers) + i}", TOKENS) for i in range(16)]
            answers += await flood.send(asked)
        return answers

    with ThreadPoolExecutor(1) as pool:  # the deed keeps the main thread: Ray adds nodes from there alone
        asking = pool.submit(asyncio.run, ask())
        try:
            deed()
        finally:
            done.set()
        answers = asking.result()
    assert {status for status, _, _ in answers} == {200}
    assert {answer["usage"]["completion_tokens"] for _, _, answer in answers} == {TOKENS}
    return len(answers)


def main(path: str) -> None:
    """A node with a replica is told to leave, and one goes without a word, while others come."""
    engine = EngineConfig(path=path, dtype="fp32", max_num_seqs=32, kv_cache_mb=8.0, threads=1)
    model = ServedModel("tiny", engine, ReplicaConfig(2, 2, resources={"CPU": 2.0}))  # one to a node
    with Site(nodes=2) as site, run([model], ServeConfig(port=0, max_queue=1000)) as app:
        (door,) = pids("ingress")
        assert not any(door in site.processes(node) for node in site.nodes), "it is on the head, which stays"

        def settled() -> bool:
            there = replicas(site)
            return [len(there[node]) for node in site.nodes] == [1] * len(site.nodes) and len(stats(app, "tiny")) == 2

        def drained() -> None:
            until(lambda: all(one["running"] for one in stats(app, "tiny")), "both are at work")
            left = site.nodes[0]
            site.add()
            site.drain(left)
            until(lambda: not replicas(site)[left] and settled(), "its replica is elsewhere")
            site.take_away(left)

        def lost() -> None:
            until(lambda: all(one["running"] for one in stats(app, "tiny")), "both are at work")
            site.add()
            site.take_away(site.nodes[0])
            until(settled, "its replica is elsewhere")

        until(settled, "both are up")
        for deed in (drained, lost):
            print(deed.__name__, answered_during(app, deed), flush=True)
        assert pids("ingress") == [door]
    print("ok")


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    main(sys.argv[1])
