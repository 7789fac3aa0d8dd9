"""Weights from one process to another on the same GPU: CUDA IPC, no copy through the host.

    trainer rank   Exports.offer() -> an Offer for each engine on its device     (record an event, export the memory)
    engine         take(offers)    -> opens them, waits for the events, copies its boxes, sums up what it then holds
    trainer rank   Exports.release(), when all engines have answered

An offer is where the rank holds what (its part of a `Layout`), and a handle of plain numbers and bytes, which torch's
own calls make and open: nothing of it is unpickled by them. What is copied is planned from the ranks' layouts to the
engine's, elementwise casts included, as between any two places. Every engine gets a handle of its own, since torch
counts those who have opened one; it is closed before the engine answers, and the exporter lets go only then.

Chosen by `in_reach`, where the ranks on an engine's own device hold all that the engine wants. Rejected: writing
through the shared directory (four passes over the host's memory and the bus twice), and the engine computing with the
trainer's buffer (an engine must be able to go on with the old weights, in its own layout and dtype).

`_export` and `_import` are all that needs a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytron.parallel.checksum import checksums
from raytron.parallel.layout import CoverageError, Layout, Place, owners, plan, relabel, retype, union
from raytron.parallel.storage import torch_dtype
from raytron.parallel.transport import InProcess, run

__all__ = ["Exports", "Offer", "identity", "in_reach", "take"]

Handle = tuple[int | bool | bytes | None, ...]


@dataclass(frozen=True)
class Offer:
    """One rank's flat buffer. device: `identity` of where it is. layout: of that rank alone. size: elements of its
    dtype, torch's name. memory, event: handles."""

    device: str
    layout: Layout
    dtype: str
    size: int
    memory: Handle
    event: bytes


def identity(device: torch.device) -> str:
    """The GPU's own name, the same in every process; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def in_reach(offers: Sequence[Offer], layout: Layout, device: str) -> bool:
    """Whether all that an engine wants, by its layout, is offered on its device. Pure."""
    if not device or any(offer.device != device for offer in offers):
        return False
    try:
        plan(_sources(offers, layout), layout)
    except CoverageError:
        return False
    return True


class Exports:
    """A rank's offers of one buffer.

    Args:
        buffer: flat, of one dtype. layout: what this rank holds there, and nothing of others.
        consumers: engine -> `identity` of its device.
    """

    def __init__(self, buffer: Tensor, layout: Layout, consumers: Mapping[int, str]) -> None:
        self._buffer, self._layout = buffer.detach(), layout
        self._device = identity(buffer.device)
        self._consumers = [engine for engine, device in consumers.items() if device and device == self._device]
        self._kept: list[Any] = []

    def offer(self) -> dict[int, Offer]:
        """Engine -> the buffer as it is when what the current stream has been given is done. Releases older offers."""
        self.release()
        dtype = str(self._buffer.dtype).removeprefix("torch.")
        offers = {}
        for engine in self._consumers:
            kept, memory, event = _export(self._buffer)
            self._kept.append(kept)
            offers[engine] = Offer(self._device, self._layout, dtype, self._buffer.numel(), memory, event)
        return offers

    def release(self) -> None:
        """Let go of what was offered; every engine that took it has answered."""
        self._kept.clear()


def take(offers: Sequence[Offer], layout: Layout, place: Place, buffer: Tensor) -> dict[str, int]:
    """Copy from the offers into a rank's own buffer; checksums of what is held then, all of it.

    layout: of that rank, at `place`, in a flat `buffer` "weights".

    Raises:
        CoverageError: the offers do not hold all of it; names a tensor.
    """
    sources: dict[tuple[Place, str], Tensor] = {}
    targets = {(place, "weights"): buffer.detach()}
    moves = plan(_sources(offers, layout), layout)
    try:
        for number, offer in enumerate(offers):
            sources[_place(number), "weights"] = _import(offer, buffer.device)
        run(moves, InProcess(sources, targets))
        return checksums(owners(layout), targets)  # numbers on the host: all copies are done
    except Exception as error:
        raise error.with_traceback(None) from None  # whose frames hold on to the memory
    finally:
        sources.clear()  # closes the memory, before the trainer hears of it


def _sources(offers: Sequence[Offer], wanted: Layout) -> Layout:
    """Where the offers have the tensors of `wanted`."""
    parts = [Layout(wanted.version, {}, {}, {})]
    for number, offer in enumerate(offers):
        ((place, _), *_) = offer.layout.sizes
        mine = retype(relabel(offer.layout, {place: _place(number)}), offer.dtype)
        tensors = {name: spec for name, spec in mine.tensors.items() if name in wanted.tensors}
        pieces = {name: mine.pieces.get(name, ()) for name in tensors}
        parts.append(Layout(wanted.version, tensors, pieces, mine.sizes))
    return union(*parts)


def _place(number: int) -> Place:
    return f"offer-{number}"


def _export(buffer: Tensor) -> tuple[Any, Handle, bytes]:
    """What must be kept, and the handles of a CUDA buffer and of an event after all that its stream has to do."""
    # A storage of its own: torch hangs its count of readers on the storage that is shared, one on top of the other.
    alias = torch.from_dlpack(buffer)
    event = torch.cuda.Event(interprocess=True)
    event.record(torch.cuda.current_stream(buffer.device))
    return (alias, event), tuple(alias.untyped_storage()._share_cuda_()), event.ipc_handle()


def _import(offer: Offer, device: torch.device) -> Tensor:
    """The offered buffer, in this process; the current stream waits for its event."""
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *offer.memory[1:])  # its number here is our own
    torch.cuda.current_stream(device).wait_event(torch.cuda.Event.from_ipc_handle(device, offer.event))
    return torch.empty(0, dtype=torch_dtype(offer.dtype), device=device).set_(storage, 0, (offer.size,), (1,))
