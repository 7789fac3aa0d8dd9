"""Transports carry any plan out to the bit: over real gloo groups, through safetensors files, and in process."""

import json
import os
import resource
import struct
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from raytron.parallel import file_layout as headers
from raytron.parallel import files
from raytron.parallel.collectives import World
from raytron.parallel.layout import Spec, only, owners, plan, relabel, retype, union, without
from raytron.parallel.mesh import Mesh
from raytron.parallel.transport import (
    Distributed,
    FileReader,
    FileWriter,
    InProcess,
    allocate,
    file_layout,
    run,
    shards,
)
from tests.parallel.layout_cases import (
    DTYPES,
    FAMILIES,
    Builder,
    assert_holds,
    canonical,
    fill,
    fused_qkv,
    gate_up,
    layouts,
    llama4_experts,
    mixtral_experts,
    raw,
    specs,
)

RANKS = 3
some = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def on_ranks(body):
    """Run body(world) on three ranks, threads with gloo groups of their own; raises what any of them raised."""
    store, errors = dist.HashStore(), []

    def one(rank):
        world = World(Mesh(dp=RANKS), rank, store, timeout=30)
        try:
            body(world)
        except Exception as error:
            errors.append(error)
        finally:
            world.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def cast(tensors, target):
    return {name: value.to(getattr(torch, target.tensors[name].dtype)) for name, value in tensors.items()}


# Messages


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("float8_e4m3fn", "float32")])
def test_messages_move_every_family(dtypes):
    """Places are dealt to ranks, so that some moves are local and some are messages; buckets are small."""
    cases = []
    for members in FAMILIES.values():
        for source, target in pairwise(members):
            source = retype(source, dtypes[0])
            target = retype(relabel(target, {p: f"new-{p}" for p in target.places}), dtypes[1])
            tensors = canonical(source.tensors)
            index = {place: i % RANKS for i, place in enumerate((*source.places, *target.places))}
            cases.append(
                (source, target, tensors, index, plan(source, target), fill(source, tensors), allocate(target))
            )

    def body(world):
        axis = world.axis("dp")
        for _, _, _, index, made, old, new in cases:
            mine = [{key: flat for key, flat in some.items() if index[key[0]] == axis.index} for some in (old, new)]
            run(made, Distributed(axis, index, *mine), max_bytes=200)

    on_ranks(body)
    for _, target, tensors, _, _, _, new in cases:
        assert_holds(target, new, cast(tensors, target))


def test_a_source_is_freed_only_when_every_target_has_it():
    """Each rank clears what a bucket moved as soon as `after` is called, and nothing is lost."""
    source, target = mixtral_experts(8), relabel(mixtral_experts(3), {f"actor-{i}": f"new-{i}" for i in range(3)})
    tensors = canonical(source.tensors)
    index = {place: i % RANKS for i, place in enumerate((*source.places, *target.places))}
    old, new, made = fill(source, tensors), allocate(target), plan(source, target)
    freed = []

    def body(world):
        axis = world.axis("dp")
        mine = [{key: flat for key, flat in some.items() if index[key[0]] == axis.index} for some in (old, new)]

        def free(bucket):
            for move in bucket.moves:
                for src in move.src:
                    if index[src] == axis.index:
                        torch.as_strided(
                            old[src, "weights"], [hi - lo for lo, hi in move.box], move.at.strides, move.at.offset
                        ).fill_(-1)
                        freed.append(move.name)

        run(made, Distributed(axis, index, *mine), max_bytes=300, after=free)

    on_ranks(body)
    assert_holds(target, new, tensors)
    assert set(freed) == set(source.tensors)


def test_a_place_without_a_rank_is_named():
    layout = fused_qkv(2)
    axis = World.single().axis("dp")
    with pytest.raises(ValueError, match="'actor-1' has no rank"):
        run(plan(layout, layout), Distributed(axis, {"actor-0": 0}, fill(layout, canonical(layout.tensors))))


# In process


def test_what_is_in_place_is_left_alone():
    layout = fused_qkv(2, dp=2)
    buffers = fill(layout, canonical(layout.tensors))
    versions = {key: flat._version for key, flat in buffers.items()}
    run(plan(layout, layout), InProcess(buffers))
    assert {key: flat._version for key, flat in buffers.items()} == versions


def test_a_missing_buffer_is_named():
    layout = fused_qkv(2)
    with pytest.raises(ValueError, match="no buffer 'weights' of place 'actor-0' was given"):
        run(plan(layout, layout), InProcess({}))


def test_allocate_needs_one_dtype_per_buffer():
    b = Builder({"a": Spec((2,), "float32"), "b": Spec((2,), "bfloat16")})
    b.add("a", ((0, 2),), "x")
    b.add("b", ((0, 2),), "x")
    with pytest.raises(ValueError, match="b is bfloat16, and buffer 'weights' of 'x' also holds float32"):
        allocate(b.build())


# Files


@pytest.fixture(params=["as they are", "tiny blocks"])
def blocks(request, monkeypatch):
    """The same with blocks and gaps so small that every path through a scratch block is taken."""
    if request.param == "tiny blocks":
        monkeypatch.setattr(files, "_BLOCK", 64)
        monkeypatch.setattr(files, "_GAP", 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_every_family(family, tmp_path, blocks):
    """Saved from each layout, read back into the next; the safetensors package reads what was written."""
    for i, (source, target) in enumerate(pairwise(FAMILIES[family])):
        tensors, root = canonical(source.tensors), tmp_path / str(i)
        disk = shards(source.tensors, 300, version=7)
        with FileWriter(root, disk, fill(source, tensors)) as writer:
            run(plan(owners(source), disk), writer)
        names = {place.removeprefix("file:") for place in disk.places}
        extra = {"model.safetensors.index.json"} if len(names) > 1 else set()
        assert set(os.listdir(root)) == names | extra
        loaded = {name: value for file in names for name, value in load_file(root / file).items()}
        assert {name: value.tolist() for name, value in loaded.items()} == {n: v.tolist() for n, v in tensors.items()}
        found = file_layout(root, version=7).check()
        assert found.tensors == disk.tensors
        new = allocate(target)
        with FileReader(root, new) as reader:
            run(plan(found, target), reader)
        assert_holds(target, new, tensors)


@some
@given(data=st.data())
def test_files_of_random_layouts(data, tmp_path_factory, blocks):
    """Any dtype and stride, with a cast on the way in and out."""
    tensors = data.draw(specs())
    source = data.draw(layouts(tensors))
    root, values = tmp_path_factory.mktemp("files"), canonical(tensors)
    kinds = [d for d in DTYPES if not d.startswith("float8")] if tensors["t0"].dtype != "float8_e4m3fn" else ["float32"]
    stored = {name: replace(spec, dtype=data.draw(st.sampled_from(kinds))) for name, spec in tensors.items()}
    disk = shards(stored, data.draw(st.integers(1, 500)), version=7)
    with FileWriter(root, disk, fill(source, values)) as writer:
        run(plan(owners(source), disk), writer)
    target = data.draw(layouts(tensors))
    new = allocate(target)
    with FileReader(root, new) as reader:
        run(plan(file_layout(root, version=7), target), reader)
    assert_holds(target, new, cast(cast(values, disk), target))


def test_index_and_metadata_are_hugging_faces(tmp_path):
    layout = mixtral_experts(2)
    tensors = canonical(layout.tensors)
    disk = shards(layout.tensors, 200, version=7)
    with FileWriter(tmp_path, disk, {}) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in layout.tensors.values())
    assert {n: f"file:{f}" for n, f in index["weight_map"].items()} == {
        name: disk.pieces[name][0].places[0] for name in layout.tensors
    }
    first = headers.read_header(tmp_path / index["weight_map"]["experts.0.w1"])
    assert first.metadata == {"format": "pt"}
    # One file in the same place hides neither behind the old index nor beside the old shards.
    with FileWriter(tmp_path, shards(layout.tensors, version=7), {}) as writer:
        for name, value in tensors.items():
            writer.write(name, value + 1)
    assert file_layout(tmp_path).places == ("file:model.safetensors",)


def test_two_writers_share_a_directory(tmp_path):
    """Each rank writes the boxes it owns; one commits when both have finished. Until then nothing is visible."""
    source = fused_qkv(2)
    tensors, disk = canonical(source.tensors), shards(source.tensors, version=7)
    made, buffers = plan(owners(source), disk), fill(source, tensors)
    writers = [FileWriter(tmp_path, disk, {key: f for key, f in buffers.items() if key[0] == p}) for p in source.places]
    for writer in writers:
        run(made, writer)
    assert sum(writer.written for writer in writers) == sum(spec.nbytes for spec in source.tensors.values())
    assert not (tmp_path / "model.safetensors").exists()
    writers[0].commit()
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "model.safetensors").items())


def test_what_was_not_written_is_not_committed(tmp_path):
    source = fused_qkv(2)
    disk = shards(source.tensors, version=7)
    buffers = fill(source, canonical(source.tensors))
    with pytest.raises(ValueError, match=r"\d+ of \d+ bytes were written"):  # noqa: SIM117
        with FileWriter(tmp_path, disk, {("actor-0", "weights"): buffers["actor-0", "weights"]}) as writer:
            run(plan(owners(source), disk), writer)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A write that the system refuses raises, takes the temporary file away and leaves what was there."""
    small = Builder({"w": (64, 64)})
    small.add("w", ((0, 64), (0, 64)), "x")
    layout = small.build()
    disk, tensors = shards(layout.tensors, version=7), canonical(layout.tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # Python ignores SIGXFSZ, so the call fails
    try:
        with pytest.raises(OSError, match="too large"), FileWriter(tmp_path, disk, fill(layout, tensors)) as writer:
            run(plan(layout, disk), writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_only_the_needed_bytes_are_read(tmp_path, monkeypatch):
    """Rows, columns and single elements of a matrix: the bytes asked of the system are the piece's own."""
    value = torch.randn(64, 4096)
    save_file({"w": value}, tmp_path / "model.safetensors")
    asked = []
    preadv = os.preadv

    def counting(fd, buffers, at):
        asked.append(sum(map(len, buffers)))
        return preadv(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", counting)
    for box in (((3, 9), (0, 4096)), ((0, 64), (1024, 3072)), ((5, 6), (7, 8)), ((0, 64), (10, 11))):
        b = Builder({"w": (64, 4096)}, version=0)
        b.add("w", box, "x")
        layout, new = b.build(), allocate(b.build())
        asked.clear()
        with FileReader(tmp_path, new) as reader:
            run(plan(file_layout(tmp_path), layout), reader)
        assert sum(asked) == new["x", "weights"].numel() * 4
        assert_holds(layout, new, {"w": value})


def test_a_rank_reads_its_own_part_only(tmp_path):
    source = gate_up(1)
    tensors = canonical(source.tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    target = replace(gate_up(3), version=0)
    made = plan(file_layout(tmp_path), target)
    mine = allocate(target, ["actor-1"])
    with FileReader(tmp_path / "model.safetensors", mine) as reader:
        run(made, reader)
    assert_holds(only(target, places=["actor-1"]), mine, tensors)


def test_what_survivors_lack_comes_from_files(tmp_path):
    """A lost shard without a twin: the union of survivors and checkpoint covers, and each transport runs its part."""
    layout = fused_qkv(4)
    tensors, buffers = canonical(layout.tensors), fill(layout, canonical(layout.tensors))
    save_file(tensors, tmp_path / "model.safetensors")
    left = union(without(layout, ["actor-2"]), file_layout(tmp_path, version=7))
    target = fused_qkv(2)
    made, new = plan(left, target), allocate(target)
    with pytest.raises(ValueError, match="is not a file; split the plan"):
        run(made, FileReader(tmp_path, new))
    run(made.filter(lambda src, dst: not src.startswith("file:")), InProcess(buffers, new))
    with FileReader(tmp_path, new) as reader:
        run(made.filter(lambda src, dst: src.startswith("file:")), reader)
    assert_holds(target, new, tensors)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's resettable memory peak")
def test_reading_with_a_cast_needs_no_copy_of_the_tensor(tmp_path):
    """A 128 MiB float32 matrix into half of it as bfloat16, transposed: peak memory rises by the target and blocks."""
    save_file({"w": torch.zeros(4096, 8192)}, tmp_path / "model.safetensors")
    b = Builder({"w": Spec((4096, 8192), "bfloat16")}, version=0)
    b.add("w", ((0, 4096), (0, 4096)), "x", order=(1, 0))
    layout = b.build()
    new = allocate(layout)
    new["x", "weights"].fill_(1)  # touched: its pages are there
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    with FileReader(tmp_path, new, threads=1) as reader:
        run(plan(file_layout(tmp_path), layout), reader)
    assert _status("VmHWM") - before < 64 * 1024
    assert not new["x", "weights"].any()


def _status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


# Bad files


def good_file(path):
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    return path.read_bytes()


def edited(raw_bytes, change):
    """The file with its header's JSON changed, lengths kept consistent."""
    (n,) = struct.unpack("<Q", raw_bytes[:8])
    head = json.loads(raw_bytes[8 : 8 + n])
    change(head)
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + raw_bytes[8 + n :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-3], "it is truncated or damaged"),
        (lambda raw: raw + b"x", "it is truncated or damaged"),
        (lambda raw: raw[:5], "truncated or not a safetensors file"),
        (lambda raw: raw[:40], "truncated or not a safetensors file"),
        (lambda raw: b"PK\x03\x04" + raw, "truncated or not a safetensors file"),
        (lambda raw: raw[:12] + b"\xff\xfe" + raw[14:], "damaged safetensors header"),
        (lambda raw: edited(raw, lambda h: h["a"].update(dtype="F7")), "a has dtype 'F7'"),
        (lambda raw: edited(raw, lambda h: h["a"].update(shape=[2, 4])), "a of shape .2, 4. .* cannot have data"),
        (lambda raw: edited(raw, lambda h: h["a"].update(shape=[-2, -3])), "a of shape .* cannot have data"),
        (lambda raw: edited(raw, lambda h: h["a"].update(data_offsets=[8, 32])), "the data of a start at byte 8"),
        (lambda raw: edited(raw, lambda h: h["a"].pop("shape")), "damaged safetensors header"),
        (lambda raw: edited(raw, lambda h: h.pop("a")), "the data of b start|truncated or damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(good_file(path)))
    with pytest.raises(ValueError, match=message) as error:
        file_layout(tmp_path)
    assert str(path) in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no safetensors file"):
        file_layout(tmp_path)
    layout = mixtral_experts(2)
    with FileWriter(tmp_path, shards(layout.tensors, 200), {}) as writer:
        for name, value in canonical(layout.tensors).items():
            writer.write(name, value)
    index = tmp_path / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    lost = tmp_path / sorted(set(body["weight_map"].values()))[1]
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name} is missing"):
        file_layout(tmp_path)
    lost.write_bytes(kept)
    body["weight_map"]["ghost"] = lost.name
    index.write_text(json.dumps(body))
    with pytest.raises(ValueError, match=f"{lost.name} lacks ghost"):
        file_layout(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        file_layout(tmp_path)


def test_a_file_cut_short_while_reading_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(64, 64)}, path)
    b = Builder({"w": (64, 64)}, version=0)
    b.add("w", ((0, 64), (0, 64)), "x")
    layout, found = b.build(), file_layout(tmp_path)
    with FileReader(tmp_path, allocate(layout)) as reader:
        run(plan(found, layout), reader)
        os.truncate(path, 1000)
        with pytest.raises(ValueError, match="ends at byte 1000; it was truncated while being read"):
            run(plan(found, layout), reader)


def test_empty_and_scalar_tensors_survive(tmp_path):
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "w": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = file_layout(tmp_path).check()
    assert found.tensors["empty"].shape == (0, 3)
    values = allocate(found)
    with FileReader(tmp_path, values) as reader:
        run(plan(found, found), reader)
    again = tmp_path / "again"
    with FileWriter(again, shards(found.tensors), values) as writer:
        run(plan(found, shards(found.tensors)), writer)
    loaded = load_file(again / "model.safetensors")
    assert {n: v.tolist() for n, v in loaded.items()} == {n: v.tolist() for n, v in tensors.items()}
    assert loaded["empty"].shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "bool", "int64", "float64"])
def test_every_dtype_survives_messages_and_files(dtype, tmp_path):
    source = retype(llama4_experts(2), dtype)
    target = retype(relabel(llama4_experts(3), {f"actor-{i}": f"new-{i}" for i in range(3)}), dtype)
    tensors = canonical(source.tensors)
    index = {place: i % RANKS for i, place in enumerate((*source.places, *target.places))}
    old, new, made = fill(source, tensors), allocate(target), plan(source, target)

    def body(world):
        axis = world.axis("dp")
        mine = [{key: flat for key, flat in some.items() if index[key[0]] == axis.index} for some in (old, new)]
        run(made, Distributed(axis, index, *mine))

    on_ranks(body)
    assert_holds(target, new, tensors)
    disk = shards(source.tensors, version=7)
    with FileWriter(tmp_path, disk, new) as writer:
        run(plan(owners(target), disk), writer)
    assert torch.equal(raw(load_file(tmp_path / "model.safetensors")["gate_up"]), raw(tensors["gate_up"]))
