"""Boxes of tensors as messages to another node: whole, or only the elements that changed since the last message.

A trained step changes a few per cent of a bf16 model's bits, strewn over all of it: no run of bytes stays the same, so
across nodes single elements are sent, (index, value). The sender keeps what it sent last; the receiver writes into what
it was sent last, and its result has the bits of a whole message.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raytron.parallel.boxes import Box, volume
from raytron.parallel.shared import SharedWeights
from raytron.parallel.storage import as_integers

__all__ = ["Receiver", "Sender", "grouped"]

Boxes = Sequence[tuple[str, Box]]
_WHOLE = -1


def grouped(boxes: Boxes, itemsize: int, max_bytes: int = 1 << 28) -> list[list[tuple[str, Box]]]:
    """The boxes of each message, in order: at most `max_bytes` of elements, or a single box."""
    messages: list[list[tuple[str, Box]]] = []
    size = 0
    for name, box in boxes:
        nbytes = volume(box) * itemsize
        if not messages or size + nbytes > max_bytes:
            messages.append([])
            size = 0
        messages[-1].append((name, box))
        size += nbytes
    return messages


class Sender:
    """Makes the messages of some boxes.

    Args:
        views: where the values of each box are, of any strides, dtype and device.
        dtype: in which they are sent.
    """

    def __init__(self, views: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._views, self._dtype = views, dtype
        self._sent: Tensor | None = None

    def message(self, delta: bool) -> np.ndarray:
        """uint8 [bytes]: with `delta` what changed since the last message, if that was with `delta` too."""
        values = torch.cat([part.detach().to("cpu", self._dtype).reshape(-1) for part in self._views])
        sent, self._sent = self._sent, values if delta else None
        if sent is None:
            return _message(None, values)
        index = np.flatnonzero(as_integers(values).numpy() != as_integers(sent).numpy())
        if 4 * len(index) >= values.nbytes - values.element_size() * len(index):
            return _message(None, values)
        return _message(index.astype(np.uint32), values[torch.from_numpy(index)])


class Receiver:
    """Writes the messages of one sender into a node's mapping.

    Args:
        boxes: those of the sender's views, in the same order.
    """

    def __init__(self, shared: SharedWeights, boxes: Boxes) -> None:
        self._shared, self._boxes = shared, boxes
        self._ends = np.cumsum([volume(box) for _, box in boxes])

    def write(self, message: np.ndarray, turn: int, delta: bool = False) -> None:
        """Write one, as push number `turn`. It is only read: it may lie in an object store."""
        count = int(message[:8].view(np.int64)[0])
        if count == _WHOLE:
            self._write_all(message[8:], turn, delta)
            return
        index = message[8 : 8 + 4 * count].view(np.uint32).astype(np.int64)
        values = message[8 + -(-4 * count // 8) * 8 :]
        cuts = np.searchsorted(index, self._ends)
        start = 0
        for (name, box), cut, end in zip(self._boxes, cuts, self._ends, strict=True):
            if cut > start:
                size = self._shared.specs[name].itemsize
                first = end - volume(box)
                some = self._tensor(name, values[start * size : cut * size])
                self._shared.put(name, box, index[start:cut] - first, some, turn)
            start = cut

    def _write_all(self, values: np.ndarray, turn: int, delta: bool) -> None:
        at = 0
        for name, box in self._boxes:
            stop = at + volume(box) * self._shared.specs[name].itemsize
            whole = self._tensor(name, values[at:stop]).view([hi - lo for lo, hi in box])
            self._shared.write(name, box, whole, turn, delta)
            at = stop

    def _tensor(self, name: str, data: np.ndarray) -> Tensor:
        with warnings.catch_warnings():  # torch knows no read-only tensors
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(data).view(self._shared.flat[name].dtype)


def _message(index: np.ndarray | None, values: Tensor) -> np.ndarray:
    """int64 count of changed elements (or that all are there), their indices, padded to 8 bytes, their values."""
    n = 0 if index is None else len(index)
    head = 8 + -(-4 * n // 8) * 8
    data = np.zeros(head + values.nbytes, np.uint8)
    data[:8].view(np.int64)[0] = _WHOLE if index is None else n
    if index is not None:
        data[8 : 8 + 4 * n].view(np.uint32)[:] = index
    data[head:] = values.view(torch.uint8).numpy()
    return data
