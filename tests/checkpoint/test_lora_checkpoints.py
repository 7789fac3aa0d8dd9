"""Checkpoints and pushes of a model with adapters: the adapters come back, the model folder has them merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raytron.checkpoint import CheckpointManager, Storage
from raytron.checkpoint.publisher import Publisher
from raytron.config import EngineConfig, LoRAConfig, ModelConfig, ParallelConfig, TrainConfig
from raytron.inference import LLM, NativeEngine, Pushed, WeightUpdateError
from raytron.models import begin, build, from_pretrained
from raytron.parallel.changes import Receiver
from raytron.parallel.checksum import combine
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from raytron.parallel.shared import SharedDirectory, SharedReader, SharedWeights
from raytron.training import DTYPES, TrainEngine
from tests.checkpoint.engines import ARCHS, batches

LORA = LoRAConfig(rank=3, alpha=6)
ARCH = replace(ARCHS["untied"], lora=LORA)
TOKENS = torch.randint(0, ARCH.vocab_size, (2, 10), generator=torch.Generator().manual_seed(0))


def make(world: World | None = None, precision: str = "fp32", lora: LoRAConfig = LORA, **parallel) -> TrainEngine:
    config, arch = ParallelConfig(**parallel), replace(ARCH, lora=lora)
    model = build(arch, world, parallel=config, dtype=DTYPES[precision], seed=4)
    batch = 4 * model.world.mesh.dp
    return TrainEngine(model, TrainConfig(parallel=config, precision=precision, global_batch_size=batch))


def train(engine: TrainEngine, steps: int) -> list[float]:
    return [engine.step(batches(engine, step)).loss for step in range(steps)]


def content(engine: TrainEngine) -> list[torch.Tensor]:
    return [engine.model.weights, *engine.optimizer.values()]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, precision: str, asynchronous: bool):
    engine, manager = make(precision=precision), CheckpointManager(tmp_path, asynchronous=asynchronous)
    train(engine, 3)
    kept = [tensor.clone() for tensor in content(engine)]
    saving = manager.save(engine)
    following = train(engine, 2)
    assert saving.result().ok
    again = make(precision=precision)
    again.record = CheckpointManager(tmp_path).load(again)
    assert all(torch.equal(a, b) for a, b in zip(content(again), kept, strict=True))
    assert train(again, 2) == following
    folder = Storage.open(manager.latest())
    assert {path.split("/")[0] for path in folder.files()} == {"adapter", "manifest.json", "model", "state"}
    state = sum(size for path, size in folder.files().items() if path.endswith(".safetensors") and "state/" in path)
    assert state < 5 * 4 * (engine.model.weights.numel() - engine.model.frozen)


def test_the_model_folder_is_complete_and_the_adapter_folder_begins_another_run(tmp_path: Path):
    engine, manager = make(), CheckpointManager(tmp_path / "run")
    train(engine, 3)
    assert manager.save(engine).result().ok
    plain = from_pretrained(f"{manager.latest()}/model")
    assert plain.arch == ARCHS["untied"]
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS), engine.model(TOKENS), rtol=0, atol=1e-5)
    config = ModelConfig(lora=LoRAConfig(path=f"{manager.latest()}/adapter"))
    assert torch.equal(begin(config, ARCH, seed=4).weights, engine.model.weights)


def _save(world, folder: str, parallel: dict) -> None:
    engine = make(world, **parallel)
    generator = torch.Generator().manual_seed(1)
    for slot in engine.model.trained:  # of elements that every layout has alike
        slot.param.data.fill_(float(torch.rand((), generator=generator)))
    assert CheckpointManager(folder).save(engine).result().ok


def _differences(world, folder: str, parallel: dict, wanted: dict) -> list[str]:
    engine = make(world, **parallel)
    CheckpointManager(folder).load(engine)
    wrong = []
    for slot in engine.model.trained:
        for part in slot.param.parts:
            box = tuple(slice(a, b) for a, b in part.box)
            if not torch.equal(part.view(slot.param.data), wanted[part.name][box]):
                wrong.append(part.name)
    return wrong


def test_adapters_of_any_layout_are_read_at_any_other(ranks, tmp_path: Path):
    from tests.models.hugging_face import stored

    ranks.run(_save, Mesh(pp=2, tp=2), str(tmp_path), {"pp": 2, "tp": 2})
    (name,) = CheckpointManager(tmp_path).list()
    found = stored(tmp_path / name / "adapter")
    wanted = {key.removeprefix("base_model.model."): value for key, value in found.items()}
    assert all(value.any() for value in wanted.values())
    for mesh, parallel in ((Mesh(tp=4), {"tp": 4}), (Mesh(dp=2, pp=2), {"pp": 2})):
        assert ranks.run(_differences, mesh, str(tmp_path), parallel, wanted) == [[]] * mesh.size


def test_a_checkpoint_of_another_kind_is_an_error_that_says_so(tmp_path: Path):
    manager = CheckpointManager(tmp_path / "adapters")
    assert manager.save(make()).result().ok
    other = LoRAConfig(rank=4)
    with pytest.raises(ValueError, match=r"has adapters \(r 3, .* and this run adapters \(r 4, .*; choose another"):
        CheckpointManager(tmp_path / "adapters").load(make(lora=other))
    with pytest.raises(ValueError, match=r"has adapters \(r 3, .* and this run no adapters"):
        CheckpointManager(tmp_path / "adapters").load(make(lora=LoRAConfig()))
    assert CheckpointManager(tmp_path / "whole").save(make(lora=LoRAConfig())).result().ok
    with pytest.raises(ValueError, match=r"has no adapters and this run adapters .*begin from the .* model.path"):
        CheckpointManager(tmp_path / "whole").load(make())


def test_adapters_do_not_go_on_beside_another_model(tmp_path: Path):
    assert CheckpointManager(tmp_path).save(make()).result().ok
    other = make()
    other.model.weights[7] += 1
    with pytest.raises(ValueError, match=r"is not the one that this run begins with .* model.path, or the preset"):
        CheckpointManager(tmp_path).load(other)
    assert CheckpointManager(tmp_path).load(make(precision="bf16")) is not None


# Pushes


@pytest.fixture
def directory(tmp_path: Path):
    made = []

    def make(lora: LoRAConfig = LORA, writers: int = 0) -> SharedDirectory:
        tensors = build(replace(ARCH, lora=lora), device="meta").layout().tensors
        made.append(SharedDirectory(tensors, {}, tmp_path, writers))
        return made[-1]

    yield make
    for each in made:
        each.close()


def ranks_of(mesh: Mesh, lora: LoRAConfig = LORA) -> list:
    parallel = ParallelConfig(tp=mesh.tp, pp=mesh.pp, sequence_parallel=False)
    arch = replace(ARCH, lora=lora)
    return [build(arch, World.sketch(mesh, r), parallel=parallel, device="cpu", seed=1) for r in range(mesh.size)]


def trains(models: list, seed: int) -> None:
    """Other adapters, everywhere the same."""
    for model in models:
        for slot in model.trained:
            slot.param.data.fill_(0.1 * seed)


class Side:
    """The trainer's ranks, all on the first node; directories on every node."""

    def __init__(self, models: list, paths: dict[str, str], adapters: bool) -> None:
        self.publishers, self.paths, self.turn, self.sums = [Publisher(model) for model in models], paths, 0, {}
        self.links = {}
        for publisher in self.publishers:
            args = (paths, [next(iter(paths))] * len(models), "float32", adapters)
            for node, messages in publisher.connect(*args).items():
                shared = SharedWeights(paths[node])
                self.links |= {(publisher, node, n): Receiver(shared, boxes) for n, boxes in enumerate(messages)}

    def push(self) -> tuple[int, int]:
        """(bytes pushed, bytes sent to other nodes)."""
        self.turn, sent = self.turn + 1, 0
        parts = [publisher.publish(self.turn) for publisher in self.publishers]
        for publisher, part in zip(self.publishers, parts, strict=True):
            for node, numbers in part.messages.items():
                for number in numbers:
                    message = publisher.outgoing(node, number)
                    self.links[publisher, node, number].write(message, self.turn)
                    sent += message.nbytes
        self.sums |= combine(part.checksums for part in parts)
        return sum(part.nbytes for part in parts), sent

    def pushed(self, node: str) -> Pushed:
        return Pushed(self.paths[node], self.turn, dict(self.sums))


def nbytes(layout) -> int:
    return sum(spec.nbytes for spec in layout.tensors.values())


@pytest.mark.parametrize("source", [Mesh(), Mesh(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("target", [Mesh(), Mesh(tp=2)], ids=str)
def test_after_the_first_push_only_adapters_travel(directory, source: Mesh, target: Mesh):
    trainers, (whole, *_) = ranks_of(source), ranks_of(Mesh())
    side = Side(trainers, {"a": directory().path, "b": directory().path}, adapters=True)
    engines = {node: ranks_of(target) for node in "ab"}
    for models in engines.values():
        for model in models:
            model.weights.zero_()
    readers = {}
    for node, models in engines.items():
        for rank, model in enumerate(models):
            frozen = model.layout().tensors.keys() - model.trained_layout().tensors.keys()
            me = f"rank-{rank}"
            args = (side.paths[node], model.layout(), me, {(me, "weights"): model.weights}, frozen)
            readers.setdefault(node, []).append(SharedReader(*args))
    wanted = ranks_of(target)
    pushed = []
    for seed in (1, 2, 3):
        trains([*trainers, *wanted, whole], seed)
        pushed.append(side.push())
        for node, models in engines.items():
            sums = combine(reader.take(side.turn) for reader in readers[node])
            assert sums == side.pushed(node).checksums
            assert sums.keys() == whole.layout().tensors.keys()
            for mine, theirs in zip(models, wanted, strict=True):
                assert torch.equal(mine.weights, theirs.weights)
    everything, adapters = nbytes(whole.layout()), nbytes(whole.trained_layout())
    assert [n for n, _ in pushed] == [everything, adapters, adapters]
    sent = [n for _, n in pushed]
    assert everything < sent[0] < 1.1 * everything
    assert adapters <= sent[1] == sent[2] < 1.1 * adapters + 100


def test_an_engine_with_adapters_confirms_all_it_holds(directory, tmp_path: Path):
    from raytron.checkpoint import save_pretrained

    save_pretrained(build(ARCHS["untied"], seed=9), tmp_path / "model")
    config = {"path": str(tmp_path / "model"), "kv_cache_mb": 2, "threads": 1}
    engine = NativeEngine(EngineConfig(**config, weights="await", lora=LORA))
    (trainer,) = ranks_of(Mesh())
    side = Side([trainer], {"a": directory(writers=1).path}, adapters=True)
    for seed in (1, 2):
        trains([trainer], seed)
        side.push()
        engine.start_weight_update()
        engine.update_weights(Pushed(side.paths["a"], side.turn, None))  # by the sums that are beside it
        engine.finish_weight_update(seed)
        assert torch.equal(engine.model.weights, trainer.weights)
        assert engine.confirmed == engine.verify(side.pushed("a"))
    engine.model.weights[5] += 1  # of a frozen matrix, behind its back
    with pytest.raises(WeightUpdateError, match=r"embed_tokens.weight: the engine holds"):
        engine.verify(side.pushed("a"))
    engine.close()
    with pytest.raises(ValueError, match=r"engine.lora is what the native engine does; give vllm a model with"):
        EngineConfig(**config, engine="vllm", lora=LORA)


def test_an_engine_reads_a_directory_and_adapters_beside_it(tmp_path: Path):
    from raytron.checkpoint import save_adapter, save_pretrained

    (model,) = ranks_of(Mesh())
    with_nothing = build(ARCHS["untied"])
    with_nothing.weights[: model.frozen] = model.weights[: model.frozen]
    save_pretrained(with_nothing, tmp_path / "model")
    trains([model], 3)
    save_adapter(model, tmp_path / "adapter")
    lora = LoRAConfig(path=str(tmp_path / "adapter"))
    with LLM(tmp_path / "model", kv_cache_mb=2, threads=1, lora=lora) as llm:
        assert torch.equal(llm.engine.model.weights, model.weights)


def test_engines_without_adapters_get_merged_weights(directory):
    (trainer,) = ranks_of(Mesh())
    side = Side([trainer], {"a": directory(LoRAConfig()).path}, adapters=False)
    plain = build(ARCHS["untied"])
    reader = SharedReader(side.paths["a"], plain.layout(), "rank-0", {("rank-0", "weights"): plain.weights})
    for seed in (1, 2):
        trains([trainer], seed)
        total, _ = side.push()
        assert total == nbytes(plain.layout())
        assert reader.take(side.turn) == side.sums
        with torch.no_grad():
            torch.testing.assert_close(plain(TOKENS), trainer(TOKENS), rtol=0, atol=1e-4)
    other = Publisher(trainer)
    with pytest.raises(ValueError, match=r"lora_A.weight: the trainer has Spec"):
        other.connect(side.paths, ["a"], "float32", True)
