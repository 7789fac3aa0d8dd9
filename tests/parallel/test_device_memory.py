"""Weights out of another process's memory on the same GPU: the choice, the copies, and who lets go when.

Without a GPU a table of tensors stands where the two driver calls are; the last test makes those calls.
"""

from __future__ import annotations

import multiprocessing
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.parallel import device_memory
from raytron.parallel.checksum import checksum
from raytron.parallel.device_memory import Exports, Offer, identity, in_reach, take
from raytron.parallel.layout import CoverageError, only, retype
from raytron.parallel.storage import allocate, torch_dtype, view
from tests.parallel.test_shared import halves, single, values


class Driver:
    """Memory by handle, as a driver keeps it: what is exported, and what is open where."""

    def __init__(self) -> None:
        self.exported: dict[int, weakref.ref] = {}
        self.opened: list[weakref.ref] = []

    def export(self, buffer: torch.Tensor) -> tuple[Any, tuple[int], bytes]:
        alias, handle = buffer.view(-1), len(self.exported)
        self.exported[handle] = weakref.ref(alias)
        return alias, (handle,), b"event"

    def open(self, offer: Offer, device: torch.device) -> torch.Tensor:
        alias = self.exported[offer.memory[0]]()
        assert alias is not None, "the exporter has let go of it"
        mine = alias.view(-1)
        self.opened.append(weakref.ref(mine))
        return mine


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(device_memory, "_export", driver.export)
    monkeypatch.setattr(device_memory, "_import", driver.open)
    monkeypatch.setattr(device_memory, "identity", lambda device: "gpu-0")
    return driver


def alive(refs) -> int:
    return sum(ref() is not None for ref in refs)


class Trainer:
    """Ranks of a layout, each with exports of its own."""

    def __init__(self, layout, consumers: dict[int, str]) -> None:
        self.layout, self.buffers = layout, allocate(layout)
        self.exports = [
            Exports(self.buffers[place, "weights"], only(layout, places=[place]), consumers) for place in layout.places
        ]

    def hold(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, piece in self.layout:
            box = tuple(slice(*span) for span in piece.box)
            view(self.buffers[piece.places[0], "weights"], piece.box, piece.spot()).copy_(tensors[name][box])

    def offers(self, engine: int) -> list[Offer]:
        return [offers[engine] for each in self.exports if engine in (offers := each.offer())]


@pytest.mark.parametrize("layout_of", [single, halves])
@pytest.mark.parametrize("theirs", ["float32", "bfloat16"])
@pytest.mark.parametrize("mine", ["float32", "bfloat16"])
def test_an_engine_holds_the_trainers_bits_in_its_own_dtype(driver, layout_of, theirs: str, mine: str):
    trainer, layout = Trainer(layout_of(theirs), {7: "gpu-0"}), single(mine)
    ((place, _), *_) = layout.sizes
    buffer = torch.zeros(layout.sizes[place, "weights"], dtype=torch_dtype(mine))
    for seed in (1, 2):
        tensors = values(seed, theirs)
        trainer.hold(tensors)
        sums = take(trainer.offers(7), layout, place, buffer)
        wanted = {name: tensor.to(torch_dtype(mine)) for name, tensor in tensors.items()}
        assert sums == {name: checksum(tensor) for name, tensor in wanted.items()}
        for name, piece in layout:
            assert torch.equal(view(buffer, piece.box, piece.spot()), wanted[name])
        assert alive(driver.opened) == 0  # closed before the engine answers
    assert alive(driver.exported.values()) == len(trainer.exports)
    for each in trainer.exports:
        each.release()
    assert alive(driver.exported.values()) == 0


@given(devices=st.lists(st.sampled_from(["gpu-0", "gpu-1", ""]), max_size=6))
def test_every_engine_on_the_device_gets_a_handle_of_its_own(devices: list[str]):
    driver = Driver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_memory, "_export", driver.export)
        patch.setattr(device_memory, "identity", lambda device: "gpu-0")
        layout = single("float32")
        exports = Exports(torch.zeros(4), layout, dict(enumerate(devices)))
        offers = exports.offer()
        assert set(offers) == {engine for engine, device in enumerate(devices) if device == "gpu-0"}
        assert len({offer.memory for offer in offers.values()}) == len(offers) == alive(driver.exported.values())
        again = exports.offer()
        assert not {offer.memory for offer in again.values()} & {offer.memory for offer in offers.values()}
        assert alive(driver.exported.values()) == len(again)


def test_on_a_cpu_nothing_is_offered():
    assert identity(torch.device("cpu")) == ""
    assert Exports(torch.zeros(4), single("float32"), {0: "", 1: "gpu-0"}).offer() == {}


def offer(layout, device: str = "gpu-0") -> Offer:
    return Offer(device, layout, "float32", 0, (), b"")


def test_the_way_is_chosen_where_ranks_on_the_engines_device_hold_all_of_it():
    both, engine = halves("float32"), retype(single("float32"), "bfloat16")
    first, second = (only(both, places=[place]) for place in both.places)
    assert in_reach([offer(first), offer(second)], engine, "gpu-0")
    assert in_reach([offer(single("float32"))], engine, "gpu-0")
    assert in_reach([offer(single("float32"))], only(engine, ["norm"]), "gpu-0")
    assert not in_reach([offer(first)], engine, "gpu-0")
    assert not in_reach([], engine, "gpu-0")
    assert not in_reach([offer(first), offer(second, "gpu-1")], engine, "gpu-0")
    assert not in_reach([offer(single("float32"))], engine, "gpu-1")
    assert not in_reach([offer(single("float32"), "")], engine, "")


def test_what_was_opened_is_closed_when_a_copy_fails(driver):
    trainer, layout = Trainer(halves("float32"), {0: "gpu-0"}), single("float32")
    offers = trainer.offers(0)
    with pytest.raises(CoverageError, match="no source holds"):
        take(offers[:1], layout, "rank-0", torch.zeros(10_000))
    with pytest.raises(RuntimeError):
        take(offers, layout, "rank-0", torch.zeros(3))  # a buffer that is too small
    assert alive(driver.opened) == 0


def consume(pipe) -> None:
    layout = single("bfloat16")
    buffer = torch.zeros(layout.sizes["rank-0", "weights"], dtype=torch.bfloat16, device="cuda:0")
    pipe.send(identity(buffer.device))
    for offers in iter(pipe.recv, None):
        pipe.send((take(offers, layout, "rank-0", buffer), buffer.float().cpu().numpy()))


@pytest.mark.gpu
def test_two_processes_on_one_gpu():
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    child = context.Process(target=consume, args=(other,), daemon=True)
    child.start()
    try:
        layout = single("float32")
        weights = torch.zeros(layout.sizes["rank-0", "weights"], device="cuda:0")
        device = pipe.recv()
        assert device == identity(weights.device)
        exports = Exports(weights, layout, {0: device})
        for seed in (1, 2, 3):
            tensors = values(seed, "float32")
            for name, piece in layout:
                view(weights, piece.box, piece.spot()).copy_(tensors[name])
            offers = [exports.offer()[0]]
            assert in_reach(offers, layout, device)
            pipe.send(offers)
            sums, held = pipe.recv()
            exports.release()
            assert sums == {name: checksum(tensor.bfloat16()) for name, tensor in tensors.items()}
            assert torch.equal(torch.from_numpy(held), weights.bfloat16().float().cpu())
        pipe.send(None)
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
