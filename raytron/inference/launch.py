"""An engine from its configuration, its other ranks started on this machine where it has any."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from raytron.config import EngineConfig
from raytron.inference.engine import NativeEngine, engine_arch, engine_parallel
from raytron.inference.types import Engine
from raytron.models import build
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh

__all__ = ["check_layout", "make_engine"]

FOREVER = 10 * 365 * 86400.0  # seconds; an engine may wait that long for its next request
START_S = 300.0  # for the other ranks to start Python and torch


def make_engine(config: EngineConfig) -> Engine:
    """The engine a configuration asks for, in this process; further ranks of tp x pp are processes of their own.

    Raises:
        ValueError: no such model, a layout it cannot be cut to, no room, or vLLM asked for and not installed.
    """
    if config.engine == "vllm":
        from raytron.inference.vllm import VLLMEngine

        return VLLMEngine(config)
    check_layout(config)
    return NativeEngine(config) if config.tp * config.pp == 1 else _ManyRanks(config)


def check_layout(config: EngineConfig) -> None:
    """ValueError for a native engine whose model is not there or cannot be cut to its layout. Takes no memory."""
    if config.engine == "native":
        arch, mesh = engine_arch(config), Mesh(tp=config.tp, pp=config.pp)
        for rank in range(mesh.size):
            build(arch, World.sketch(mesh, rank), parallel=engine_parallel(config), device="meta")


class _ManyRanks(NativeEngine):
    """Rank 0 of an engine whose other ranks it has started, and ends."""

    def __init__(self, config: EngineConfig) -> None:
        self._ranks = _Ranks(config)
        try:
            super().__init__(config, self._ranks.world())
        except BaseException:
            self._ranks.end(stopped=False)
            raise

    def close(self) -> None:
        """See `Engine.close`."""
        if not self._closed:
            super().close()
            self._ranks.end(stopped=True)


class _Ranks:
    """The processes of ranks 1.. of an engine."""

    def __init__(self, config: EngineConfig) -> None:
        self._mesh = Mesh(tp=config.tp, pp=config.pp)
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._world: World | None = None
        context = multiprocessing.get_context("spawn")
        self._processes, pipes = [], []
        threads = config.threads or max(1, (os.cpu_count() or 1) // self._mesh.size)
        torch.set_num_threads(threads)
        for rank in range(1, self._mesh.size):
            mine, theirs = context.Pipe(duplex=False)
            args = (config, self._mesh, rank, self._store.port, threads, theirs)
            process = context.Process(target=_serve, args=args, name=f"raytron-rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            pipes.append(mine)
        self._await_start(pipes)

    def _await_start(self, pipes: list[Connection]) -> None:
        """Meet only once everybody is there to be met: a rendezvous cannot be abandoned."""
        for process, pipe in zip(self._processes, pipes, strict=True):
            if not pipe.poll(START_S) or not _received(pipe):
                self.end(stopped=False)
                raise RuntimeError(f"{process.name} did not start (exit code {process.exitcode}); its output says why")

    def world(self) -> World:
        """Rank 0's seat."""
        self._world = World(self._mesh, 0, self._store, timeout=FOREVER)
        threading.Thread(target=self._watch, daemon=True, name="raytron-ranks").start()
        return self._world

    def _watch(self) -> None:
        """A rank that dies releases rank 0 from waiting for it."""
        wait([process.sentinel for process in self._processes])
        gone = [process.name for process in self._processes if not process.is_alive()]
        self._world.give_up(f"{', '.join(gone)} ended")

    def end(self, stopped: bool) -> None:
        """Join the processes; unless they were told to stop, end them."""
        for process in self._processes:
            if not stopped:
                process.terminate()
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()
        if self._world is not None:
            self._world.close()


def _received(pipe: Connection) -> bool:
    try:
        return bool(pipe.recv())
    except EOFError:  # the process is gone
        return False


def _serve(config: EngineConfig, mesh: Mesh, rank: int, port: int, threads: int, pipe: Any) -> None:
    """A rank's whole life."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which then says stop
    torch.set_num_threads(threads)
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    pipe.send(True)
    world = World(mesh, rank, store, timeout=FOREVER)
    NativeEngine(config, world).follow()
    os._exit(0)  # groups with a peer that has gone would block a normal exit
