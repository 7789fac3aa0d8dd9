"""A saved model is a Hugging Face directory, whatever layout it was saved from."""

from __future__ import annotations

import json
import resource
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from raytron.checkpoint import Storage, convert, save_pretrained
from raytron.checkpoint.huggingface import export_model
from raytron.data.tokenizer import ByteTokenizer
from raytron.models import build, from_pretrained
from raytron.models.registry import family_of
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from tests.checkpoint.engines import ARCHS, canonical, differences, make

LAYOUTS = [("untied", {"tp": 4}), ("untied", {"pp": 2, "tp": 2}), ("tied", {"pp": 4}), ("tied", {"dp": 2, "pp": 2})]


def tensors_in(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    return found


def expected(arch: str, seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    layout = build(ARCHS[arch]).layout()
    return {name: canonical(name, "weights", seed, layout, torch.float32).to(dtype) for name in layout.tensors}


def same(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted
    )


def _save(world, arch, path, parallel, **options):
    save_pretrained(make(world, arch, seed=5, **parallel).model, path, **options)


@pytest.mark.parametrize(("arch", "axes"), LAYOUTS)
def test_any_layout_writes_the_same_tensors(ranks, tmp_path, arch, axes):
    """Load at any layout, save, and every tensor is there bit for bit: padding, replicas and stages leave no trace."""
    parallel = {axis: n for axis, n in axes.items() if axis != "dp"}
    ranks.run(
        _save,
        Mesh(**axes),
        arch,
        str(tmp_path / "model"),
        parallel,
    )
    assert same(tensors_in(tmp_path / "model"), expected(arch, 5))
    assert not [p for p in tmp_path.iterdir() if p.name != "model"]
    ranks.run(_load_and_save, Mesh(**axes), str(tmp_path / "model"), str(tmp_path / "again"))
    assert same(tensors_in(tmp_path / "again"), expected(arch, 5))


def _load_and_save(world, path, again):
    save_pretrained(from_pretrained(path, world), again, shard_mb=0.005)


def test_sharded_files_and_their_index(ranks, tmp_path):
    """Several writers, in bf16, with a tokenizer."""
    folder = tmp_path / "model"
    options = {"dtype": torch.bfloat16, "shard_mb": 0.005, "tokenizer": ByteTokenizer()}
    ranks.run(_save_with, Mesh(tp=2, pp=2), "untied", str(folder), {"tp": 2, "pp": 2}, options)
    assert same(tensors_in(folder), expected("untied", 5, torch.bfloat16))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 4
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected("untied", 5, torch.bfloat16).values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["model_type"]) == ("bfloat16", "llama")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 3
    assert (folder / "tokenizer.json").is_file()


def _save_with(world, arch, path, parallel, options):
    _save(world, arch, path, parallel, **options)


@pytest.mark.parametrize("arch", ["untied", "tied"])
def test_transformers_loads_it(tmp_path, arch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build(ARCHS[arch], seed=3)
    save_pretrained(model, tmp_path / "model", tokenizer=ByteTokenizer(), shard_mb=0.01)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens_BT = torch.arange(12).view(2, 6) % ARCHS[arch].vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), theirs(tokens_BT).logits, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").decode([104, 105]) == "hi"


def test_saving_over_another_model(tmp_path, location):
    """Old shards go, foreign files stay."""
    first, second = make(seed=1).model, make(seed=2).model
    save_pretrained(first, location, shard_mb=0.005)
    Storage.open(location).write("notes.txt", b"mine")
    save_pretrained(second, location)
    folder = tmp_path / "runs"
    assert same(tensors_in(folder), expected("untied", 2))
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    ]  # fmt: skip
    assert differences(make_loaded(folder), 2) == []


def make_loaded(folder):
    """An engine with the weights of a directory, and moments of seed 2."""
    engine = make(seed=2)
    engine.model.weights.copy_(from_pretrained(folder).weights)
    return engine


def test_a_tokenizer_is_copied_from_a_directory(tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "weights.bin").write_bytes(b"no")
    model = make(seed=1).model
    save_pretrained(model, tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert "tokenizer.json" in names
    assert "weights.bin" not in names
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no tokenizer files"):
        save_pretrained(model, tmp_path / "x", tokenizer=tmp_path / "empty")


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=4), Mesh(dp=2, pp=2)])
def test_memory_stays_within_twice_the_largest_tensor(mesh):
    """What a rank stages, receives and packs for others in a bucket, all at once."""
    job = export_model(build("llama3.2-1b", World.sketch(mesh, 0), device="meta"), shard_mb=500)
    largest = max(spec.nbytes for spec in job.target.tensors.values())
    for bucket in job.plan.buckets(job.bucket):
        held = Counter()
        for move in bucket.moves:
            for source, file in move.pairs():
                sender, writer = int(source.removeprefix("rank-")), job.writers[file]
                held[writer] += bucket.nbytes(move)
                if sender != writer:
                    held.update({sender: bucket.nbytes(move), writer: bucket.nbytes(move)})
        assert max(held.values()) <= 2 * largest


def test_all_writers_work_at_once():
    """Files are spread evenly over ranks, and each bucket keeps most of them busy."""
    job = export_model(build("llama3-8b", World.sketch(Mesh(tp=4), 0), device="meta"), shard_mb=500)
    load = dict.fromkeys(range(4), 0)
    for place, tensors in job.files.items():
        load[job.writers[place]] += sum(spec.nbytes for spec in tensors.values())
    assert max(load.values()) <= 1.3 * min(load.values())
    busy = [len({job.writers[p] for m in bucket.moves for p in m.dst}) for bucket in job.plan.buckets(job.bucket)]
    assert sum(busy) / len(busy) > 2


@contextmanager
def largest_file(nbytes: int):
    """No file of this process can grow beyond `nbytes`: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    model = make(seed=1).model
    with largest_file(40_000), pytest.raises(OSError, match=r"model.safetensors: File too large"):
        save_pretrained(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shards", [0.005, 5000])
def test_convert(tmp_path, location, shards):
    source = tmp_path / "source"
    save_pretrained(make(seed=4).model, source, tokenizer=ByteTokenizer(), shard_mb=0.02)
    convert(source, location, dtype=torch.bfloat16, shard_mb=shards)
    folder = tmp_path / "runs"
    assert same(tensors_in(folder), expected("untied", 4, torch.bfloat16))
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (folder / "model.safetensors.index.json").is_file() == (shards < 1)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "runs"}
    convert(location, tmp_path / "back", dtype=torch.float32)
    wanted = {name: t.float() for name, t in expected("untied", 4, torch.bfloat16).items()}
    assert same(tensors_in(tmp_path / "back"), wanted)


def test_convert_refuses(tmp_path):
    save_pretrained(make(seed=4).model, tmp_path / "a")
    with pytest.raises(ValueError, match="into itself"):
        convert(tmp_path / "a", tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        convert(tmp_path, tmp_path / "b")


def test_configuration_is_the_family_s():
    arch = ARCHS["tied"]
    assert family_of(arch).from_hf(family_of(arch).to_hf(arch)) == arch
