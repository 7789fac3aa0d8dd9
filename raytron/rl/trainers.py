"""The trainer actors of an RL run, seen from the driver's event loop: the policy's group, and a critic's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raytron.actors import TrainerGroup
from raytron.parallel.mesh import Mesh
from raytron.rl.algorithms import Algorithm
from raytron.rl.config import RLConfig
from raytron.rl.task import CriticTask, PolicyTask, Scores
from raytron.rl.types import Batch

__all__ = ["Trainers"]


class Trainers:
    """Starts the actors; use it as a context manager, or call `close`.

    Args:
        config, arch, mesh: the run's, its model's, and the trainer's.
        algorithm: says which fields a batch needs.
        checkpoints: folder or URI; the critic's lie beside the policy's.
        tokenizer: directory whose tokenizer every saved model gets.
        say: takes a line for the user.
        wait_s: how long to wait for the cluster to grant seats.

    Attributes:
        policy: the policy's group.

    Raises:
        CapacityError: the cluster cannot hold them.
        WorkerError: a rank failed; so may every method.
    """

    def __init__(
        self,
        config: RLConfig,
        arch: Any,
        mesh: Mesh,
        algorithm: Algorithm,
        checkpoints: str,
        tokenizer: Path,
        say: Callable[[str | None], None],
        wait_s: float,
    ) -> None:
        self.config, self.algorithm, self._say, self._where = config, algorithm, say, checkpoints
        self._groups: list[TrainerGroup] = []
        try:
            self.policy = self._start(mesh, wait_s, PolicyTask, config, arch, checkpoints, str(tokenizer))
            self._critic = None
            if algorithm.needs_critic:
                self._critic = self._start(mesh, wait_s, CriticTask, config, arch, f"{checkpoints}-critic")
        except BaseException:
            self.close()
            raise

    def _start(self, mesh: Mesh, wait_s: float, task: type, *args: Any) -> TrainerGroup:
        group = TrainerGroup(mesh, replace(self.config.scaling, num_workers=mesh.size), wait_s=wait_s)
        self._groups.append(group)
        group.create(task, *args)
        return group

    def load(self) -> int:
        """Continue from the newest version that everybody has a good checkpoint of; 0 where there are none at all.

        A run that was cut between two saves has a newer one of the critic than of the policy.
        """
        versions = [self._load(group) for group in self._groups]
        while len(set(versions)) > 1:
            oldest = min(versions)
            if oldest == 0:
                raise ValueError(
                    f"of the policy's and the critic's checkpoints (`{self._where}`, `{self._where}-critic`) no good "
                    "two are of one version; restore one, or remove both folders to start anew"
                )
            pairs = zip(self._groups, versions, strict=True)
            versions = [v if v == oldest else self._load(group, oldest) for group, v in pairs]
        return versions[0]

    def _load(self, group: TrainerGroup, most: int | None = None) -> int:
        version, damaged = group.load(most)
        for problem in damaged:
            self._say(f"passed over a damaged checkpoint: {problem}")
        return version

    async def scored(self, batch: Batch) -> Batch:
        """The batch with the fields the algorithm asks for: "old", "reference", "values"."""
        wanted: dict[str, tuple[TrainerGroup, tuple[Any, ...]]] = {}
        if self.algorithm.needs_old:
            wanted["old"] = (self.policy, ())
        if self.algorithm.needs_reference:
            wanted["reference"] = (self.policy, (True,))
        if self._critic is not None:
            wanted["values"] = (self._critic, ())
        if not wanted:
            return batch
        shared = ray.put(batch)
        calls = (asyncio.to_thread(group.call, "score", shared, *args) for group, args in wanted.values())
        parts = await asyncio.gather(*calls)
        return batch.having(**{name: _joined(batch, p) for name, p in zip(wanted, parts, strict=True)})

    async def train(self, batch: Batch) -> dict[str, float]:
        """One step of everything that is trained; the policy's metrics, and the critic's as critic/..."""
        shared = ray.put(batch)
        found = await asyncio.gather(*(asyncio.to_thread(group.call, "train", shared) for group in self._groups))
        policy, *critic = (next(r for r in results if r is not None) for results in found)
        return policy | {f"critic/{name}": value for metrics in critic for name, value in metrics.items()}

    async def sleep(self) -> None:
        """Give the policy's seats to engines that share them; without such engines nothing happens."""
        if self.config.rollout.colocate:
            await asyncio.to_thread(self.policy.call, "sleep")

    async def wake(self) -> None:
        """Be ready to train, after `sleep`."""
        if self.config.rollout.colocate:
            await asyncio.to_thread(self.policy.call, "wake")

    async def save(self, wait: bool = False) -> None:
        """Save the committed step, in the background unless `wait`; the user is told of saves that failed."""
        for group in reversed(self._groups):  # the policy's last: with it the version exists
            self._say(await asyncio.to_thread(group.save, wait=wait))

    def latest(self) -> str | None:
        """Where the policy's newest checkpoint is, once every save has ended."""
        return self.policy.call("latest")[0]

    def close(self) -> None:
        """End the actors."""
        for group in self._groups:
            group.shutdown()

    def __enter__(self) -> Trainers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            for group in self._groups:
                group.abandon(f"the driver left with {type(error).__name__}")
        self.close()


def _joined(batch: Batch, parts: Sequence[Scores | None]) -> np.ndarray:
    """The ranks' numbers in one array [T]; 0 for tokens nobody has one for (the first of each trajectory)."""
    out = np.zeros(len(batch.tokens), np.float32)
    for index, values in filter(None, parts):
        out[index] = values
    return out
