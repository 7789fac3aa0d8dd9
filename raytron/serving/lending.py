"""Weights for a replica that starts, out of the memory of one that has them: what is on disk by then may be gone, or
other weights under the same name.

    newcomer --holds--> every replica     who has which weights, and where
    newcomer --lend---> one of them       whose ranks write them into a directory in shared memory
    newcomer --part---> the same          chunks of the file, through Ray's object store; none where both are on a node
    newcomer --returned                   the directory is removed

Only a newcomer asks: a replica that is there when weights change takes them from where they were put.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from raytron.inference import EngineLoop, NativeEngine
from raytron.parallel.shared import FILE, SharedDirectory

__all__ = ["Held", "Lender", "Lent", "Peers"]

log = logging.getLogger("raytron.serving")

CHUNK = 1 << 28  # bytes
KEPT_S = 600.0  # what is lent is removed then, whatever has become of the borrower
KNOWN_S, LOOK_S = 2.0, 0.1  # for Serve to say which replicas there are, and between two looks


class Held(NamedTuple):
    """What a replica has: its name, its node, and the number of the weights' change; -1 where it cannot lend them."""

    owner: str
    node: str
    update: int


class Lent(NamedTuple):
    """Weights (`replica.Weights`, whose path says where they were once) in a directory of the owner's node."""

    weights: tuple[int, str, int]
    folder: str
    nbytes: int


class Lender:
    """The side that has weights.

    Args:
        loop: of the engine. owner: the replica's name.
    """

    def __init__(self, loop: EngineLoop, owner: str) -> None:
        self.owner, self._loop = owner, loop
        self._directory: SharedDirectory | None = None
        self._lent: Lent | None = None
        self._borrowers = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def able(self) -> bool:
        """Whether the engine's weights can be had, and are whole."""
        return isinstance(self._loop.engine, NativeEngine) and self._loop.health == "ready"

    async def lend(self, weights: tuple[int, str, int]) -> Lent:
        """The engine's weights, which are `weights`, in a directory that stays until it is returned.

        Raises WeightUpdateError where the engine's ranks are on several nodes, OSError where there is no room.
        """
        if self._lent is None or self._lent.weights != tuple(weights):
            self.close()
            engine = self._loop.engine
            made = await asyncio.to_thread(SharedDirectory, engine.tensors, {}, tempfile.gettempdir())
            try:
                await self._loop.call(lambda engine: engine.write_weights(made.path))
            except BaseException:
                made.close()
                raise
            self._directory = made
            self._lent = Lent(tuple(weights), made.path, Path(made.path, FILE).stat().st_size)
        self._borrowers += 1
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(KEPT_S, self.close)
        return self._lent

    def part(self, start: int) -> np.ndarray:
        """uint8: a chunk of what is lent. Raises OSError when it is not any more."""
        if self._lent is None:
            raise FileNotFoundError("nothing is lent")
        with Path(self._lent.folder, FILE).open("rb") as file:
            file.seek(start)
            return np.frombuffer(file.read(CHUNK), np.uint8)

    def returned(self) -> None:
        """A borrower has what it needs."""
        self._borrowers -= 1
        if self._borrowers <= 0:
            self.close()

    def close(self) -> None:
        """Remove what is lent."""
        if self._directory is not None:
            self._directory.close()
        self._directory, self._lent, self._borrowers = None, None, 0


class Peers:
    """The other replicas of the one that this is called in.

    Args:
        node: this replica's.
    """

    def __init__(self, node: str) -> None:
        context = serve.get_replica_context()
        self.name, self._node = context.replica_id.unique_id, node
        self._where = context.deployment, context.app_name
        self._handle: Any = None

    @asynccontextmanager
    async def borrowed(self, update: int) -> AsyncIterator[Lent | None]:
        """Weights of change number `update` or a later one in a directory of this node; None where nobody has them."""
        holders = [held for held in await self._holders() if held.update >= update and held.owner != self.name]
        if not holders:
            yield None
            return
        owner, where, _ = min(holders, key=lambda held: held.node != self._node)
        lent = next((Lent(*one) for one in await self._everywhere("lend", owner) if one is not None), None)
        try:
            if lent is None or where == self._node:
                yield lent
                return
            with tempfile.TemporaryDirectory(prefix="raytron-borrowed-", dir=_roomy(lent.nbytes)) as folder:
                yield lent._replace(folder=folder) if await self._fetched(lent, owner, Path(folder, FILE)) else None
        finally:
            if lent is not None:
                await self._everywhere("returned", owner)

    async def _holders(self) -> list[Held]:
        """What the replicas that run have. A handle that is new knows of none for a moment."""
        for _ in range(round(KNOWN_S / LOOK_S)):
            if known := await self._everywhere("holds"):
                return [Held(*held) for held in known]
            await asyncio.sleep(LOOK_S)
        return []

    async def _fetched(self, lent: Lent, owner: str, to: Path) -> bool:
        with to.open("wb") as file:
            for start in range(0, lent.nbytes, CHUNK):
                found = [part for part in await self._everywhere("part", owner, start) if part is not None]
                if not found:
                    return False
                await asyncio.to_thread(file.write, found[0])
        return to.stat().st_size == lent.nbytes

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        """What each replica that runs answers, without those that cannot."""
        if self._handle is None:
            self._handle = serve.get_deployment_handle(*self._where)
        try:
            answers = self._handle.broadcast(method, *args)
            return [a for a in await answers.results_async(return_exceptions=True) if not isinstance(a, Exception)]
        except (RayError, RayServeException) as error:
            log.warning("no replica could be asked for weights: %s", error)
            return []


def _roomy(nbytes: int) -> str | None:
    """Shared memory if it has room."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 1.1 * nbytes + (64 << 20) else None
