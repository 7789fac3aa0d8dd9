"""What each part of a recovery could take at best on this machine, measured without Ray, model or run.

A function each: what is left of the part when all that could be left out is.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raytron.config import PretrainConfig
from raytron.models.registry import resolve
from raytron.parallel.boxes import subtract_all, volume
from raytron.parallel.layout import Layout, without
from raytron.parallel.mesh import Mesh
from raytron.training.seating import Holdings, Seating, optimizer_buffers

ROUNDS = 5


def detect() -> float:
    """Seconds from the SIGKILL of a process to the end of its connection at a peer."""
    program = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1]))).recv(1)"
    return statistics.median(_closed(program) for _ in range(ROUNDS))


def _closed(program: str) -> float:
    with socket.create_server(("127.0.0.1", 0)) as server:
        victim = subprocess.Popen([sys.executable, "-c", program, str(server.getsockname()[1])])
        peer, _ = server.accept()
        with peer:
            start = time.perf_counter()
            os.kill(victim.pid, signal.SIGKILL)
            peer.recv(1)
            took = time.perf_counter() - start
        victim.wait()
    return took


def rendezvous(ranks: int) -> float:
    """Seconds in which so many processes, all there already, form a gloo group and pass a barrier."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_meet, (ranks, folder), nprocs=ranks)
        return statistics.median(map(float, Path(folder, "took").read_text().split()))


def _meet(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    took, keep = [], []
    for round_ in range(ROUNDS + 1):
        start = time.perf_counter()
        keep.append(dist.ProcessGroupGloo(dist.PrefixStore(str(round_), store), rank, ranks, timedelta(seconds=60)))
        keep[-1].allreduce([torch.zeros(1)]).wait()
        took.append(time.perf_counter() - start)  # of the second and later ones: all begin together
    if rank == 0:
        Path(folder, "took").write_text(" ".join(map(str, took[1:])))


def copy_rate(megabytes: int = 100) -> float:
    """Bytes per second of a copy in memory that is there, one thread."""
    source, target = torch.ones(2, megabytes * 2**18).unbind()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        target.copy_(source)
        return source.nbytes / min(_timed(lambda: target.copy_(source)) for _ in range(ROUNDS))
    finally:
        torch.set_num_threads(threads)


def process() -> float:
    """Seconds from nothing to a process that has imported torch and Ray."""
    program = [sys.executable, "-c", "import ray, torch"]
    return min(_timed(lambda: subprocess.run(program, check=True)) for _ in range(2))


def bytes_to_move(config: PretrainConfig, change: Mapping[str, Any]) -> int:
    """Bytes that each place is to hold after the change less what it held, without any plan."""
    arch, (names, wide) = resolve(config.model), optimizer_buffers(config)
    old, new = (
        Holdings(config, arch, Seating(Mesh(dp=told["mesh"][0]), told["places"]))
        for told in (change["old"], change["new"])
    )
    source = old.weights if change["whole"] else old.owned_weights
    moved = _missing(without(source, change["lost"]), new.weights) * 4
    return moved + _missing(without(old.optimizer, change["lost"]), new.optimizer) * wide.itemsize * len(names)


def _missing(source: Layout, target: Layout) -> int:
    """Elements that places lack."""
    count = 0
    for place in {place for place, _ in target.sizes}:
        held, wanted = _boxes(source, place), _boxes(target, place)
        count += sum(volume(box) for name in wanted for box in subtract_all(wanted[name], held.get(name, ())))
    return count


def _boxes(layout: Layout, place: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, piece in layout.at(place):
        found.setdefault(name, []).append(piece.box)
    return found


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
