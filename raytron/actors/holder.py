"""The actor that owns the shared directory of a node with engines, which another node's may be copied from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from raytron.parallel.boxes import whole
from raytron.parallel.changes import Receiver, Sender, grouped
from raytron.parallel.layout import Spec
from raytron.parallel.shared import SharedDirectory, SharedWeights
from raytron.parallel.storage import torch_dtype

__all__ = ["Holder"]


@ray.remote(num_cpus=0, max_restarts=0)
class Holder:
    """Owns a node's shared directory, and writes into it what comes from other nodes."""

    def create(self, tensors: Mapping[str, Spec], files: Mapping[str, bytes], fallback: str, writers: int) -> str:
        """Make the directory; its path. writers: ranks of the trainer on this node."""
        self._directory = SharedDirectory(tensors, files, fallback, writers)
        self._shared = SharedWeights(self._directory.path)
        self._receivers: dict[tuple[int, int], Receiver] = {}
        return self._directory.path

    def expect(self, sender: int, messages: Sequence[Any]) -> None:
        """What a rank will send."""
        for number, boxes in enumerate(messages):
            self._receivers[sender, number] = Receiver(self._shared, boxes)

    def receive(self, sender: int, number: int, message: np.ndarray, turn: int, delta: bool) -> None:
        """Write a message of `Publisher.outgoing`."""
        self._receivers[sender, number].write(message, turn, delta)

    def contents(self) -> list[list[tuple[str, Any]]]:
        """The boxes of each message in which all that is here can be sent."""
        shared, (dtype,) = self._shared, {spec.dtype for spec in self._shared.specs.values()}
        boxes = [(name, whole(spec.shape)) for name, spec in shared.specs.items()]
        self._messages = grouped(boxes, torch_dtype(dtype).itemsize)
        self._dtype = torch_dtype(dtype)
        return self._messages

    def send(self, message: int) -> np.ndarray:
        """One of the messages of `contents`, for another node's `receive`."""
        views = [self._shared.part(name, box) for name, box in self._messages[message]]
        return Sender(views, self._dtype).message(delta=False)

    def give_up(self, turn: int) -> None:
        """Tell who takes a push in that it will not be finished."""
        self._shared.progress.give_up(turn)

    def close(self) -> None:
        """Remove the directory."""
        self._directory.close()
