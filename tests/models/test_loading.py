"""A Hugging Face directory read at any layout: every bit arrives, little memory is used, what is wrong is named."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from raytron.checkpoint import save_pretrained
from raytron.config import ParallelConfig
from raytron.models import build, from_pretrained
from raytron.parallel.mesh import Mesh
from tests.models.hugging_face import canonical, random_model, same_bits, sizes, stored

# mesh, layers of each stage (3 in all; None: as even as it goes)
LAYOUTS = [
    (Mesh(tp=4), None),
    (Mesh(tp=2, pp=2), (1, 2)),
    (Mesh(dp=2, tp=2), None),
    (Mesh(pp=2, dp=2), (2, 1)),
    (Mesh(pp=3), None),
]
DRAWN = {
    "model_type": "qwen3", "vocab_size": 37, "hidden_size": 24, "head_dim": 8, "intermediate_size": 20,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def load_and_save(world, source, target, layers):
    parallel = ParallelConfig(pp=world.mesh.pp, tp=world.mesh.tp, layers_per_stage=layers)
    save_pretrained(from_pretrained(source, world, parallel=parallel), target, shard_mb=0.01)


@pytest.mark.parametrize(("mesh", "layers"), LAYOUTS, ids=str)
def test_every_layout_gives_back_every_bit(ranks, tmp_path_factory, mesh, layers):
    @settings(max_examples=3, deadline=None, phases=(Phase.reuse, Phase.generate))
    @given(sizes(tp=4), st.integers(0, 1000))
    def check(drawn, seed):
        folder = tmp_path_factory.mktemp("model")
        random_model(drawn | {"num_hidden_layers": 3}, seed).save_pretrained(folder / "theirs", max_shard_size="20KB")
        ranks.run(load_and_save, mesh, str(folder / "theirs"), str(folder / "ours"), layers)
        assert same_bits(stored(folder / "ours"), stored(folder / "theirs"))

    check()


def logits_of(world, path, tokens_BT, sequence_parallel):
    model = from_pretrained(path, world, parallel=ParallelConfig(sequence_parallel=sequence_parallel))
    with torch.no_grad():
        return model(tokens_BT).numpy()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_cut_over_tp_gives_whole_logits_on_every_rank(ranks, tmp_path, tied):
    theirs = random_model(DRAWN | {"tie_word_embeddings": tied})
    theirs.save_pretrained(tmp_path)
    tokens_BT = torch.arange(30).view(2, 15) * 5 % 37  # sequence parallelism cannot share 15 tokens out evenly
    with torch.no_grad():
        wanted = theirs(tokens_BT).logits
    for tp, sequence_parallel in ((2, False), (4, False), (4, True)):
        for logits in ranks.run(logits_of, Mesh(tp=tp), str(tmp_path), tokens_BT, sequence_parallel):
            torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=0, atol=1e-4)


def test_half_precision_goes_to_fp32_and_back_without_loss(tmp_path):
    random_model(DRAWN, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    wide = from_pretrained(tmp_path / "bf16")
    assert wide.weights.dtype == torch.float32
    wanted = stored(tmp_path / "bf16")
    assert same_bits(canonical(wide), {name: tensor.float() for name, tensor in wanted.items()})
    save_pretrained(wide, tmp_path / "again", dtype=torch.bfloat16)
    assert same_bits(stored(tmp_path / "again"), wanted)
    narrow = from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    assert same_bits(canonical(narrow), wanted)


@pytest.fixture
def directory(tmp_path):
    """A tied model of ours as Hugging Face stores it: (folder, its tensors)."""
    random_model(DRAWN | {"tie_word_embeddings": True}).save_pretrained(tmp_path)
    return tmp_path, stored(tmp_path)


def test_tensors_without_a_place_are_passed_over(directory):
    """The stored twin of a tied head, and the rotary buffers of old checkpoints."""
    folder, tensors = directory
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors | more, folder / "model.safetensors")
    assert same_bits(canonical(from_pretrained(folder)), tensors)


@pytest.mark.parametrize("missing", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_norm.weight"])
def test_a_missing_tensor_is_named_with_its_directory(directory, missing):
    folder, tensors = directory
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{folder}: {missing}: the source has no tensor of that name"):
        from_pretrained(folder)


def test_a_tensor_of_another_shape_is_named_with_its_directory(directory):
    folder, tensors = directory
    tensors["model.norm.weight"] = torch.ones(23)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"{folder}: model.norm.weight: canonical shape \(23,\) in the source and \(24,\)"
    ):
        from_pretrained(folder)


def test_a_damaged_directory_is_named(directory):
    folder, tensors = directory
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors has .* truncated or damaged"):
        from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="holds no safetensors file"):
        from_pretrained(folder)
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors is missing"):
        from_pretrained(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(whole)
    assert same_bits(canonical(from_pretrained(folder)), tensors)


def test_a_longer_sequence_than_rope_allows_is_refused(directory):
    model = from_pretrained(directory[0])
    with pytest.raises(ValueError, match=r"sequence_length 65 exceeds .* max_position_embeddings 64; shorten it"):
        model(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("llama9"), r"preset 'llama9' is unknown; there are llama-tiny, llama-3m, .*qwen3-32b"),
        (partial(build, "llama-3m", parallel=ParallelConfig(virtual_stages=7)), r"6 layers cannot fill .* = 7 chunks"),
    ],
)
def test_what_cannot_be_built_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


MEASURE = """
import math, re, sys
from pathlib import Path
import torch
from raytron.models import from_pretrained

torch.set_num_threads(1)
folder, tiny = sys.argv[1:]
from_pretrained(tiny)  # whatever is allocated once

def resident(kind):  # VmHWM, the most so far, is this program's; getrusage's would include what its parent had
    return 1024 * int(re.search(kind + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = resident("VmRSS")
model = from_pretrained(folder, dtype=torch.float32)
weights = model.weights.nbytes
largest = max(4 * math.prod(part.shape) for slot in model.slots for part in slot.param.parts)
print(weights, largest, resident("VmHWM") - before - weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_no_more_than_two_tensors_beside_the_model(tmp_path):
    """A model of 200 MB in fp32, stored in bf16 so that every tensor is cast."""
    arch = {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "large")
    random_model(DRAWN).save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, largest, loading = map(int, done.stdout.split())
    assert weights > 190e6
    assert loading <= 2 * largest
