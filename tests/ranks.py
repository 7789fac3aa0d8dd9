"""A pool of rank processes that lives as long as the test session: starting torch once is enough."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh


class RankPool:
    """`pool.run(fn, mesh, *args)` calls fn(world, *args) on every rank of the mesh and returns the results by rank."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._generation = count()
        self._pipes, self._processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self._store.port), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], mesh: Mesh, *args: Any) -> list[Any]:
        prefix = f"run{next(self._generation)}"
        for pipe in self._pipes[: mesh.size]:
            pipe.send((fn, mesh, prefix, args))
        answers = [pipe.recv() for pipe in self._pipes[: mesh.size]]
        errors = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text]
        assert not errors, "\n".join(errors)
        return [result for _, result in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def _serve(rank: int, pipe, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    while (job := pipe.recv()) is not None:
        fn, mesh, prefix, args = job
        world = None
        try:
            world = World(mesh, rank, store, timeout=60.0, prefix=prefix)
            answer = (None, fn(world, *args))
        except Exception:
            answer = (traceback.format_exc(), None)
        finally:
            if world is not None:
                world.close()
        pipe.send(answer)
    os._exit(0)  # a test that gave up may have left a gloo group that would block a normal exit
