"""Weights get from any trainer layout to any engine layout with every bit, and with proof. No Ray, no groups."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raytron.checkpoint import save_pretrained
from raytron.checkpoint.publisher import Publisher
from raytron.config import EngineConfig
from raytron.inference import NativeEngine, Pushed, Request, SamplingParams, WeightUpdateError
from raytron.models import build, from_pretrained
from raytron.models.arch import DecoderConfig
from raytron.models.base import ShardedModel
from raytron.parallel import Mesh, World, device_memory, shared
from raytron.parallel.changes import Receiver
from raytron.parallel.checksum import combine, fold
from raytron.parallel.layout import only, retype
from raytron.parallel.progress import WriterGone
from raytron.parallel.shared import SharedDirectory, SharedReader, SharedWeights
from raytron.parallel.storage import view
from tests.checkpoint.engines import ARCHS

ARCH, TIED = ARCHS["untied"], ARCHS["tied"]


def ranks_of(arch: DecoderConfig, mesh: Mesh, dtype: torch.dtype = torch.float32) -> list[ShardedModel]:
    """Every rank's part of a model, all in this process."""
    return [build(arch, World.sketch(mesh, rank), dtype=dtype) for rank in range(mesh.size)]


def train(models: list[ShardedModel], seed: int) -> None:
    """New weights, the same at any layout."""
    for model in models:
        model.initialize(seed)


@pytest.fixture
def directory(tmp_path) -> Callable[..., SharedDirectory]:
    made = []

    def make(arch: DecoderConfig, dtype: str, writers: int = 0) -> SharedDirectory:
        tensors = retype(build(arch, device="meta").layout(), dtype).tensors
        made.append(SharedDirectory(tensors, {}, tmp_path, writers))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Side:
    """A trainer on a mesh, its ranks spread over nodes, and a directory on each node with engines."""

    def __init__(self, models: list[ShardedModel], directories: dict[str, SharedDirectory], nodes, dtype: str) -> None:
        self.models, self.turn = models, 0
        self.paths = {node: made.path for node, made in directories.items()}
        self.publishers = [Publisher(model) for model in models]
        self.links = []
        for publisher in self.publishers:
            outgoing = publisher.connect(self.paths, nodes, dtype)
            for node, messages in outgoing.items():
                shared = SharedWeights(self.paths[node])
                self.links += [(publisher, node, k, Receiver(shared, boxes)) for k, boxes in enumerate(messages)]
        self.received = 0

    def push(self, delta: bool = False) -> dict[str, Pushed]:
        self.turn += 1
        parts = [publisher.publish(self.turn, delta) for publisher in self.publishers]
        self.received = 0
        for publisher, node, number, receiver in self.links:
            message = publisher.outgoing(node, number, delta)
            self.received += message.nbytes
            receiver.write(message, self.turn, delta)
        sums = combine(part.checksums for part in parts)
        self.nbytes = sum(part.nbytes for part in parts)
        return {node: Pushed(path, self.turn, sums) for node, path in self.paths.items()}


def reads(models: list[ShardedModel], pushed: Pushed) -> dict[str, int]:
    """Every rank of an engine takes a push; their checksums together."""
    sums = []
    for rank, model in enumerate(models):
        me = f"rank-{rank}"
        sums.append(SharedReader(pushed.path, model.layout(), me, {(me, "weights"): model.weights}).take(pushed.turn))
    return combine(sums)


LAYOUTS = [Mesh(), Mesh(tp=2), Mesh(dp=2, pp=2), Mesh(pp=2, tp=2)]


@pytest.mark.parametrize("arch", [ARCH, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("source", LAYOUTS, ids=str)
@pytest.mark.parametrize("target", [Mesh(), Mesh(tp=2), Mesh(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_layout_to_any_layout(directory, arch, source: Mesh, target: Mesh, dtype: str):
    """A fp32 trainer; engines in either dtype hold the very bits of the cast weights, as if built so."""
    trainers = ranks_of(arch, source)
    side = Side(trainers, {"node": directory(arch, dtype)}, ["node"] * source.size, dtype)
    engines = ranks_of(arch, target, getattr(torch, dtype))
    wanted = ranks_of(arch, target)
    for seed, delta in ((1, False), (2, False), (2, True), (3, True)):
        train([*trainers, *wanted], seed)
        pushed = side.push(delta)["node"]
        assert reads(engines, pushed) == pushed.checksums
        for mine, theirs in zip(engines, wanted, strict=True):
            assert torch.equal(mine.weights, theirs.weights.to(mine.weights.dtype))
    assert side.nbytes == SharedWeights(side.paths["node"]).nbytes


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
@pytest.mark.parametrize("target", [Mesh(), Mesh(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engines_that_read_while_ranks_write_hold_the_same(
    directory, monkeypatch, source: Mesh, target: Mesh, dtype: str
):
    """Readers are there before the first rank writes; a fp32 trainer, in both dtypes."""
    monkeypatch.setattr(shared, "BLOCK", 512)
    trainers, engines = ranks_of(ARCH, source), ranks_of(ARCH, target, getattr(torch, dtype))
    made = directory(ARCH, dtype, writers=source.size)
    side, wanted = Side(trainers, {"node": made}, ["node"] * source.size, dtype), ranks_of(ARCH, target)
    readers = [
        SharedReader(made.path, model.layout(), f"rank-{rank}", {(f"rank-{rank}", "weights"): model.weights})
        for rank, model in enumerate(engines)
    ]
    with ThreadPoolExecutor(len(readers)) as pool:
        for seed, delta in ((1, False), (2, False), (2, True), (3, True)):
            train([*trainers, *wanted], seed)
            taking = [pool.submit(reader.take, side.turn + 1) for reader in readers]
            pushed = side.push(delta)["node"]
            assert combine(each.result() for each in taking) == pushed.checksums
            assert SharedWeights(made.path).progress.sums(side.turn) == pushed.checksums
            for mine, theirs in zip(engines, wanted, strict=True):
                assert torch.equal(mine.weights, theirs.weights.to(mine.weights.dtype))


def nudge(models: list[ShardedModel]) -> None:
    """Change row 3 of every tensor, the same at any layout."""
    for rank, model in enumerate(models):
        for _, piece in only(model.layout(), places=[f"rank-{rank}"]):
            lo, hi = piece.box[0]
            if lo <= 3 < hi:
                view(model.weights, piece.box, piece.spot())[3 - lo] *= 2


@pytest.mark.parametrize("nodes", ["aabb", "abab", "bbbb"])
def test_other_nodes_get_what_their_own_ranks_do_not_hold(directory, nodes: str):
    """Engines on two nodes: the same bits on both, deltas in far fewer bytes, and nothing sent that is there."""
    trainers = ranks_of(ARCH, Mesh(dp=2, tp=2), torch.bfloat16)
    side = Side(trainers, {node: directory(ARCH, "bfloat16") for node in "ab"}, nodes, "bfloat16")
    wanted = ranks_of(ARCH, Mesh(tp=2), torch.bfloat16)
    engines = {node: ranks_of(ARCH, Mesh(tp=2), torch.bfloat16) for node in "ab"}
    received = []
    train([*trainers, *wanted], 1)
    for _ in range(3):  # the first with delta is whole: there is nothing yet that it could be relative to
        pushed = side.push(delta=True)
        received.append(side.received)
        for node, ranks in engines.items():
            assert reads(ranks, pushed[node]) == pushed[node].checksums
            assert all(torch.equal(a.weights, b.weights) for a, b in zip(ranks, wanted, strict=True))
        nudge(trainers)
        nudge(wanted)
    total = SharedWeights(side.paths["a"]).nbytes
    if nodes == "aabb":  # a replica on each node
        assert received == [0, 0, 0]
    else:
        assert total / 2 < received[0] < total * 1.1
        assert max(received[1:]) < received[0] / 4


@pytest.fixture
def engine(tmp_path) -> NativeEngine:
    folder = tmp_path / "model"
    folder.mkdir()
    save_pretrained(build(ARCH, seed=9), folder)
    config = EngineConfig(path=str(folder), kv_cache_mb=2, threads=1, weights="await")
    engine = NativeEngine(config)
    yield engine
    engine.close()


def answer(engine: NativeEngine) -> tuple[list[int], list[int]]:
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return [t for o in outputs for t in o.token_ids], [v for o in outputs for v in o.versions]


def update(engine: NativeEngine, pushed: Pushed, version: int) -> None:
    engine.start_weight_update()
    engine.update_weights(pushed)
    engine.finish_weight_update(version)


def test_an_engine_that_awaits_weights_answers_after_the_first_push(directory, engine):
    (trainer,) = ranks_of(ARCH, Mesh())
    side = Side([trainer], {"node": directory(ARCH, "float32")}, ["node"], "float32")
    with pytest.raises(ValueError, match=r"stale \(it has had no weights yet\)"):
        answer(engine)
    assert engine.stats().health.startswith("stale")
    train([trainer], 4)
    pushed = side.push()["node"]
    update(engine, pushed, 7)
    assert engine.stats().health == "ready"
    tokens, versions = answer(engine)
    assert versions == [7] * 8
    assert engine.confirmed == engine.verify(pushed)
    own = NativeEngine(
        EngineConfig(path=engine.config.path, kv_cache_mb=2, threads=1), model=trainer.use_kernels(False)
    )
    assert answer(own)[0] == tokens


def test_a_stale_engine_is_caught_by_its_checksum(directory, engine, monkeypatch):
    (trainer,) = ranks_of(ARCH, Mesh())
    side = Side([trainer], {"node": directory(ARCH, "float32")}, ["node"], "float32")
    train([trainer], 1)
    update(engine, side.push()["node"], 1)
    train([trainer], 2)
    pushed = side.push()["node"]
    with pytest.raises(WeightUpdateError, match=r"\.weight: the engine holds checksum .* where the trainer pushed"):
        engine.verify(pushed)
    take = engine.runner.take
    monkeypatch.setattr(engine.runner, "take", lambda path, turn: take(path, None))  # it copies nothing
    with pytest.raises(WeightUpdateError, match=r"\.weight: the engine holds checksum"):
        update(engine, pushed, 2)
    assert engine.confirmed is None
    assert engine.stats().health.startswith("stale: ")
    monkeypatch.undo()
    update(engine, pushed, 2)
    assert engine.version == 2


def test_weights_that_came_another_way_are_overwritten_by_the_next_push(directory, engine):
    (trainer,) = ranks_of(ARCH, Mesh())
    side = Side([trainer], {"node": directory(ARCH, "float32")}, ["node"], "float32")
    train([trainer], 1)
    update(engine, side.push()["node"], 1)
    engine.start_weight_update()
    engine.update_weights(engine.config.path)
    engine.finish_weight_update(2)
    pushed = side.push(delta=True)["node"]  # of which nothing is new
    update(engine, pushed, 3)
    assert torch.equal(engine.model.weights, trainer.weights)


def test_a_directory_of_another_model_is_refused(directory):
    (trainer,) = ranks_of(ARCH, Mesh())
    other = directory(replace(ARCH, num_hidden_layers=ARCH.num_hidden_layers + 1), "float32")
    with pytest.raises(ValueError, match=r"model\.layers\.\d+\..*: the trainer has None"):
        Publisher(trainer).connect({"node": other.path}, ["node"], "float32")


def test_the_directory_is_a_hugging_face_directory(directory, tmp_path):
    trainers = ranks_of(ARCH, Mesh(tp=2))
    made = directory(ARCH, "float32")
    side = Side(trainers, {"node": made}, ["node"] * 2, "float32")
    train(trainers, 5)
    side.push()
    save_pretrained(build(ARCH, seed=0), tmp_path / "small")
    (Path(made.path) / "config.json").write_bytes((tmp_path / "small" / "config.json").read_bytes())
    assert torch.equal(from_pretrained(made.path).weights, build(ARCH, seed=5).weights)


def test_an_engine_takes_a_push_while_it_is_written(directory, engine):
    (trainer,) = ranks_of(ARCH, Mesh())
    side = Side([trainer], {"node": directory(ARCH, "float32", writers=1)}, ["node"], "float32")
    with ThreadPoolExecutor(1) as pool:
        for version in (1, 2):
            train([trainer], version)
            taking = pool.submit(update, engine, Pushed(side.paths["node"], version, None), version)
            pushed = side.push()["node"]
            taking.result()
            assert engine.confirmed == fold(pushed.checksums) == engine.verify(pushed)
            assert torch.equal(engine.model.weights, trainer.weights)


def test_other_weights_than_the_writers_is_an_error_that_names_the_tensor(directory, engine):
    (trainer,) = ranks_of(ARCH, Mesh())
    side = Side([trainer], {"node": directory(ARCH, "float32", writers=1)}, ["node"], "float32")
    train([trainer], 1)
    pushed = side.push()["node"]
    flat = SharedWeights(pushed.path).flat["model.norm.weight"]
    flat[3] += 1  # after it was written
    with pytest.raises(
        WeightUpdateError, match=r"model\.norm\.weight: the engine holds checksum .* the trainer pushed"
    ):
        update(engine, Pushed(pushed.path, pushed.turn, None), 1)
    assert engine.stats().health.startswith("stale: model.norm.weight")


def test_a_push_that_is_given_up_stops_the_engine_until_the_next_one(directory, engine):
    """Requests wait; nothing is computed with weights of two versions, whatever the engine is told."""
    (trainer,) = ranks_of(ARCH, Mesh())
    side = Side([trainer], {"node": directory(ARCH, "float32", writers=1)}, ["node"], "float32")
    train([trainer], 1)
    update(engine, side.push()["node"], 1)
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)))
    outputs = engine.step() + engine.step()
    told = SharedWeights(side.paths["node"]).progress
    told.reach(0, 2, told.blocks // 2)
    told.give_up(2)
    with pytest.raises(WriterGone, match="push 2 was given up"):
        update(engine, Pushed(side.paths["node"], 2, None), 2)
    assert engine.stats().health == "stale: its last push was not finished"
    assert engine.step() == engine.pause("wait") == []
    assert engine.has_unfinished()
    with pytest.raises(RuntimeError, match="a weight update is under way"):
        engine.resume()
    side.turn = 2
    train([trainer], 3)
    pushed = side.push(delta=True)["node"]
    update(engine, pushed, 3)
    assert engine.confirmed == engine.verify(pushed)
    assert engine.stats().health == "ready"
    while engine.has_unfinished():
        outputs += engine.step()
    assert [v for o in outputs for v in o.versions] == [1, 1, 3, 3, 3, 3]


def test_an_engine_takes_weights_out_of_memory_on_its_own_device(engine, monkeypatch):
    """The trainer's side and the engine's, over a table of buffers in the place of CUDA's handles."""
    table: list[torch.Tensor] = []
    monkeypatch.setattr(device_memory, "identity", lambda device: "gpu-0")
    monkeypatch.setattr(device_memory, "_export", lambda buffer: (None, (table.append(buffer), len(table) - 1), b""))
    monkeypatch.setattr(device_memory, "_import", lambda offer, device: table[offer.memory[1]])
    trainers, (whole,) = ranks_of(ARCH, Mesh(tp=2)), ranks_of(ARCH, Mesh())
    publishers = [Publisher(model) for model in trainers]
    assert [each.connect({}, ["node"] * 2, "float32", False, {0: "gpu-0", 1: "gpu-1"}) for each in publishers] == [
        {},
        {},
    ]
    for version in (1, 2):
        train([*trainers, whole], version)
        parts = [publisher.publish(version) for publisher in publishers]
        offers = [part.offers[0] for part in parts]
        assert all(part.offers.keys() == {0} for part in parts)
        assert device_memory.in_reach(offers, engine.model.layout(), "gpu-0")
        pushed = Pushed("", version, combine(part.checksums for part in parts), offers)
        update(engine, pushed, version)
        assert torch.equal(engine.model.weights, whole.weights)
        assert engine.confirmed == fold(pushed.checksums) == engine.verify(pushed)
        assert sum(part.nbytes for part in parts) == sum(s.nbytes for s in whole.layout().tensors.values())
    engine.model.weights[5] += 1
    with pytest.raises(WeightUpdateError, match=r"\.weight: the engine holds checksum"):
        engine.verify(pushed)
