"""A checkpoint is all there or not there, comes back bit for bit at any layout, and costs the step next to nothing."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading

import pytest
import torch

from raytron.checkpoint import CheckpointManager, DamagedFile, Storage
from raytron.checkpoint.manager import _Snapshot
from raytron.checkpoint.manifest import complete
from raytron.data.tokenizer import ByteTokenizer
from raytron.models import from_pretrained
from raytron.parallel.mesh import Mesh
from tests.checkpoint.engines import batches, differences, fill, make
from tests.checkpoint.faults import Crash, Fuse, GatedStorage, mortal
from tests.checkpoint.test_huggingface import largest_file


def save(location, *seeds, arch="untied", **options):
    """Checkpoints of these seeds, by one engine."""
    manager, engine = CheckpointManager(location, **options), make(arch=arch)
    for seed in seeds:
        fill(engine, seed)
        assert manager.save(engine).result().error is None
    return manager


def load(location, **engine):
    """(record, engine) of a fresh engine after loading."""
    fresh = make(**engine)
    return CheckpointManager(location).load(fresh), fresh


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_round_trip(location, precision, asynchronous):
    engine = make(precision=precision, seed=7)
    manager = CheckpointManager(location, asynchronous=asynchronous, shard_mb=0.02)
    assert manager.load(engine) is None
    assert manager.save(engine, ByteTokenizer()).result().ok
    record, fresh = load(location, precision=precision)
    assert record == engine.record
    assert differences(fresh, 7) == []
    assert manager.list() == ["step_00000007"]
    assert Storage.open(location).read("latest") == b"step_00000007\n"
    assert "model/tokenizer.json" in Storage.open(manager.latest()).files()


def test_an_older_checkpoint_can_be_asked_for(tmp_path):
    manager = save(tmp_path, 3, 5, 9, keep=None)
    for most, step in ((9, 9), (8, 5), (5, 5), (4, 3)):
        engine = make()
        assert manager.load(engine, most)["step"] == step
        assert differences(engine, step) == []
    assert manager.load(make(), 2) is None


def test_the_model_folder_is_a_hugging_face_directory(tmp_path):
    manager = save(tmp_path, 3)
    assert torch.equal(from_pretrained(f"{manager.latest()}/model").weights, make(seed=3).model.weights)


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_precision_may_change(tmp_path, before, after):
    """Masters come from fp32 weights, and fp32 weights from masters: nothing is rounded on the way."""
    manager, engine = CheckpointManager(tmp_path), make(precision=before, seed=2)
    manager.save(engine)
    manager.close()
    assert differences(load(tmp_path, precision=after)[1], 2) == []


LAYOUTS = [
    {"axes": {"tp": 2, "pp": 2}, "sequence_parallel": False},
    {"axes": {"dp": 4}, "bucket_mb": 0.01},
    {"axes": {"dp": 2, "tp": 2}, "zero": False},
    {"axes": {"tp": 4}},
    {"axes": {"pp": 2, "dp": 2}, "virtual_stages": 2},
    {"axes": {}},
]


def _engine(world, layout, arch, seed=0):
    parallel = {k: v for k, v in layout.items() if k != "axes"} | {
        k: v for k, v in layout["axes"].items() if k in ("tp", "pp")
    }
    return make(world, arch, "bf16", seed, **parallel)


def _save(world, location, layout, arch, seed, asynchronous):
    """Save, then load on the same layout."""
    manager = CheckpointManager(location, asynchronous=asynchronous, shard_mb=0.01)
    assert manager.save(_engine(world, layout, arch, seed)).result().error is None
    return _load(world, location, layout, arch, seed)


def _load(world, location, layout, arch, seed):
    engine = _engine(world, layout, arch)
    return CheckpointManager(location).load(engine)["step"], differences(engine, seed)


@pytest.mark.parametrize("arch", ["untied", "tied"])
def test_every_layout_loads_every_other(ranks, tmp_path, arch):
    """TP, PP, virtual stages, DP, ZeRO: each saves, and the next one round (and itself) reads it to the bit."""
    layouts = [layout for layout in LAYOUTS if arch == "untied" or "virtual_stages" not in layout]
    for i, (layout, other) in enumerate(zip(layouts, [*layouts[1:], layouts[0]], strict=True)):
        step, location = i + 1, str(tmp_path / str(i))
        answers = ranks.run(_save, Mesh(**layout["axes"]), location, layout, arch, step, i % 2 == 0)
        answers += ranks.run(_load, Mesh(**other["axes"]), location, other, arch, step)
        assert answers == [(step, [])] * len(answers)


def test_replicas_write_nothing_twice(ranks, tmp_path):
    """Without ZeRO, data-parallel ranks hold the same: the state is on disk once."""
    for zero in (True, False):
        layout = {"axes": {"dp": 4}, "zero": zero}
        ranks.run(_save, Mesh(dp=4), str(tmp_path / str(zero)), layout, "untied", 1, False)
        files = Storage.open(tmp_path / str(zero) / "step_00000001" / "state").files()
        shards = [n for path, n in files.items() if path.endswith(".safetensors")]
        assert len(shards) == (4 if zero else 1)
        three_buffers = 3 * 4 * make().model.weights.numel()  # both moments and masters in fp32
        assert three_buffers <= sum(shards) < 1.2 * three_buffers


# Crashes


@pytest.mark.parametrize("again", [False, True])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(tmp_path, location, again):
    """Also when the step being saved has a checkpoint already (which local storage replaces, remote storage first
    takes away, so there the one before it counts)."""
    storage, at, survivors, crashed = Storage.open(location), 0, set(), True
    save(tmp_path / "before", 1, 2, arch="tiny")
    engine, fresh, later = make(arch="tiny", seed=9), make(arch="tiny"), make(arch="tiny", seed=4)
    engine.record = engine.record | {"step": 2 if again else 3}
    while crashed:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "runs")
        try:
            CheckpointManager(mortal(storage, Fuse(at)), asynchronous=False, keep=2).save(engine)
            crashed = False
        except Crash:
            at += 1
        record = CheckpointManager(location).load(fresh)
        content = next(seed for seed in (9, 2, 1) if not differences(fresh, seed))
        assert record["step"] == {9: engine.record["step"], 2: 2, 1: 1}[content]
        survivors.add(content)
        assert CheckpointManager(location).save(later).result().ok
        assert set(storage.folders()) == set(complete(storage)) > {"step_00000004"}
    assert at > 30
    assert survivors == ({9, 2, 1} if again and not storage.renames else {9, 2})


# Damage


DAMAGE = {
    "missing": lambda storage, path: storage.delete(path),
    "truncated": lambda storage, path: storage.write(path, storage.read(path)[:-1]),
    "flipped": lambda storage, path: storage.write(path, _flipped(storage.read(path))),
}


def _flipped(data: bytes) -> bytes:
    middle = len(data) * 2 // 3
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


PATHS = ["model/model.safetensors", "model/config.json", "state/shard-00000.safetensors", "state/layout.json"]


@pytest.mark.parametrize("path", [*PATHS, "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(location, caplog, path, damage):
    """Resume takes the one before it and says which file was wrong; with none left, it refuses."""
    save(location, 1, 2, arch="tiny")
    storage = Storage.open(location)
    DAMAGE[damage](storage / "step_00000002", path)
    with caplog.at_level(logging.WARNING):
        record, engine = load(location, arch="tiny")
    assert record["step"] == 1
    assert differences(engine, 1) == []
    if (path, damage) != ("manifest.json", "missing"):  # then it is no checkpoint
        assert f"step_00000002/{path}" in caplog.text
    DAMAGE[damage](storage / "step_00000001", path)
    if (path, damage) == ("manifest.json", "missing"):
        assert load(location, arch="tiny")[0] is None
    else:
        with pytest.raises(DamagedFile, match=f"every checkpoint is damaged.*{path}"):
            load(location, arch="tiny")


@pytest.mark.parametrize("position", [0, 9, 30, 200, 700])
def test_a_flip_in_a_header_is_damage_too(tmp_path, position):
    """It may read as another tensor name or shape; that must not be taken for another model."""
    save(tmp_path, 1, 2)
    path = tmp_path / "step_00000002" / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert load(tmp_path)[0]["step"] == 1


def test_damaged_checkpoints_do_not_count(tmp_path):
    """After falling back, the next save prunes what is damaged, not what is good."""
    save(tmp_path, 1, 2, 3, keep=3)
    DAMAGE["flipped"](Storage.open(tmp_path), "step_00000003/model/config.json")
    manager, engine = CheckpointManager(tmp_path, keep=2), make()
    assert manager.load(engine)["step"] == 2
    fill(engine, 4)
    assert manager.save(engine).result().ok
    assert manager.list() == ["step_00000004", "step_00000002"]


def _load_damaged(world, location):
    engine = make(world, tp=world.mesh.tp, pp=world.mesh.pp)
    record = CheckpointManager(location).load(engine)
    return record["step"], differences(engine, 1)


def _save_two(world, location):
    engine, manager = make(world, tp=2, pp=2, seed=1), CheckpointManager(location, shard_mb=0.01)
    manager.save(engine).result()  # `fill` passes no barrier
    fill(engine, 2)
    return manager.save(engine).result().error


@pytest.mark.parametrize("mesh", [Mesh(tp=2, pp=2), Mesh(tp=4), Mesh(dp=2)])
def test_all_ranks_fall_back_together(ranks, tmp_path, mesh):
    """Whichever file is damaged and whoever reads it, on the layout that wrote it and on others."""
    assert set(ranks.run(_save_two, Mesh(tp=2, pp=2), str(tmp_path))) == {None}
    newest = Storage.open(tmp_path / "step_00000002")
    model = sorted(path for path in newest.files() if path.startswith("model/model-"))
    for path in (model[2], "state/shard-00002.safetensors", "model/config.json"):
        data = newest.read(path)
        newest.write(path, _flipped(data))
        assert ranks.run(_load_damaged, mesh, str(tmp_path)) == [(1, [])] * mesh.size
        newest.write(path, data)


def test_another_model_is_refused_not_passed_over(location):
    save(location, 1, 2)
    with pytest.raises(ValueError, match=r"canonical shape|no tensor of that name"):
        load(location, arch="tied")


# Failures while saving


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path, caplog):
    manager, engine = save(tmp_path, 1), make(seed=2)
    with largest_file(60_000):
        saved = manager.save(engine).result()
    assert "step_00000002" in saved.error
    assert ".safetensors: File too large" in saved.error
    assert saved.error in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]
    assert load(tmp_path)[0]["step"] == 1
    assert manager.save(engine).result().ok
    assert load(tmp_path)[0]["step"] == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_no_space_left(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        manager, engine = CheckpointManager(tmp_path, keep=None), make()
        errors = []
        for seed in range(1, 6):
            fill(engine, seed)
            errors.append(manager.save(engine).result().error)
        assert errors[0] is None
        assert "No space left on device" in errors[-1]
        assert load(tmp_path)[0]["step"] == errors.index(next(filter(None, errors)))
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _fail_on_one(world, location):
    manager, engine = CheckpointManager(location, shard_mb=0.01), make(world, tp=2, pp=2, seed=1)
    with largest_file(12_000 if world.rank == 2 else 1 << 40):
        first = manager.save(engine).result().error
    return first, manager.save(engine).result().error, manager.load(engine)["step"]


def test_one_rank_that_cannot_write_fails_the_save_for_all(ranks, tmp_path):
    answers = ranks.run(_fail_on_one, Mesh(tp=2, pp=2), str(tmp_path))
    assert len(set(answers)) == 1
    assert "File too large" in answers[0][0]
    assert answers[0][1:] == (None, 1)


def test_a_tokenizer_that_cannot_be_saved_is_reported(tmp_path):
    class Broken:
        def save(self, directory):
            raise RuntimeError("no vocabulary")

    manager, engine = CheckpointManager(tmp_path), make(seed=1)
    assert manager.save(engine, Broken()).result().error == "tokenizer: no vocabulary"
    assert manager.list() == []


# Pruning and asynchrony


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (3, [4, 3, 2]), (None, [4, 3, 2, 1])])
def test_pruning(location, keep, left):
    assert save(location, 1, 2, 3, 4, keep=keep).list() == [f"step_{n:08d}" for n in left]
    with pytest.raises(ValueError, match="num_to_keep is 0"):
        CheckpointManager(location, keep=0)


def test_what_is_saved_is_the_step_it_was_asked_for(tmp_path):
    """Training goes on while the files are not even open: nothing of later steps gets into them."""
    gate, engine = threading.Event(), make(seed=1)
    manager = CheckpointManager(GatedStorage(tmp_path, gate))
    saving = manager.save(engine)
    for step in range(3):
        engine.step(batches(engine, step))
    assert not saving.done()
    assert len(differences(engine, 1)) > 0
    gate.set()
    assert saving.result().ok
    record, fresh = load(tmp_path)
    assert record["step"] == 1
    assert differences(fresh, 1) == []


def test_the_barrier_waits_for_the_copy():
    live = {"weights": torch.arange(10.0)}
    snapshot = _Snapshot(live)
    snapshot.begin(live)
    update = threading.Thread(target=snapshot.barrier)
    update.start()
    assert update.is_alive()
    copied = snapshot.finish(live)
    update.join(60)
    assert not update.is_alive()
    live["weights"].zero_()
    assert torch.equal(copied["weights"], torch.arange(10.0))


def test_an_engine_is_saved_after_another(tmp_path):
    """A regrown engine of another layout, same manager: plans and snapshots follow it."""
    manager = CheckpointManager(tmp_path)
    for seed, arch in ((1, "untied"), (2, "tied")):
        assert manager.save(make(arch=arch, seed=seed)).result().ok
    record, engine = load(tmp_path, arch="tied")
    assert record["step"] == 2
    assert differences(engine, 2) == []
