"""Presets are the published models: as many parameters, built without memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from raytron.config import ModelConfig
from raytron.models import PRESETS, build, resolve
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh

PARAMETERS = {
    "llama3-8b": 8030261248,
    "llama3-70b": 70553706496,
    "llama3.1-8b": 8030261248,
    "llama3.1-70b": 70553706496,
    "llama3.1-405b": 405853388800,
    "llama3.2-1b": 1235814400,
    "llama3.2-3b": 3212749824,
    "qwen2.5-0.5b": 494032768,
    "qwen2.5-1.5b": 1543714304,
    "qwen2.5-3b": 3085938688,
    "qwen2.5-7b": 7615616512,
    "qwen2.5-14b": 14770033664,
    "qwen2.5-32b": 32763876352,
    "qwen2.5-72b": 72706203648,
    "qwen3-0.6b": 596049920,
    "qwen3-1.7b": 1720574976,
    "qwen3-4b": 4022468096,
    "qwen3-8b": 8190735360,
    "qwen3-14b": 14768307200,
    "qwen3-32b": 32762123264,
}


def test_every_published_model_is_here():
    assert PARAMETERS.keys() == PRESETS.keys() - {"llama-3m", "llama-tiny"}
    assert 2e6 < build("llama-3m", device="meta").num_parameters() < 4e6


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_equal_the_published_count(name):
    model = build(name, device="meta")
    assert model.num_parameters() == PARAMETERS[name]
    assert model.weights.is_meta


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama3-8b", Mesh(tp=8)),
        ("llama3.2-1b", Mesh(tp=4, pp=4)),  # tied: the embedding is on both ends
        ("qwen2.5-0.5b", Mesh(dp=2, tp=2, pp=3)),
        ("qwen2.5-7b", Mesh(tp=4)),
    ],
)
def test_the_ranks_of_a_unit_hold_every_parameter_once(name, mesh):
    ranks = [build(name, World.sketch(mesh, rank), device="meta") for rank in range(mesh.unit)]
    held = sum(model.num_parameters() for model in ranks)
    arch = PRESETS[name]
    twin = arch.vocab_size * arch.hidden_size if arch.tie_word_embeddings and mesh.pp > 1 else 0
    assert held == PARAMETERS[name] + twin


def test_a_run_resolves_its_preset_and_overrides():
    arch = resolve(ModelConfig(preset="llama3-8b", overrides={"num_hidden_layers": 2, "hidden_size": 1024}))
    assert (arch.num_hidden_layers, arch.hidden_size, arch.head_dim, arch.vocab_size) == (2, 1024, 32, 128256)
    apart = resolve(ModelConfig(preset="qwen3-0.6b", overrides={"hidden_size": 512}))
    assert apart.head_dim == 128


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preset": "llama9"}, r"model.preset 'llama9' is unknown; there are llama-tiny, llama-3m, llama3-8b"),
        ({"overrides": {"layers": 2}}, r"model.overrides: unknown field 'layers'; the architecture has family"),
        ({"overrides": {"hidden_size": "big"}}, r"hidden_size is 'big'; expected int"),
        ({"overrides": {"num_hidden_layers": 0}}, r"num_hidden_layers is 0; it must be at least 1"),
        ({"overrides": {"num_attention_heads": 30}}, r"num_attention_heads 30 is not divisible by num_key"),
        ({"preset": "llama3-8b", "overrides": {"hidden_size": 100}}, r"hidden_size 100 is not divisible"),
        ({"overrides": {"qk_norm": True}}, r"llama has qk_norm False, not True"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_have_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        resolve(ModelConfig(**config))


@pytest.mark.parametrize(
    ("name", "mesh", "message"),
    [
        ("llama3-8b", Mesh(tp=3), r"num_attention_heads 32 is not divisible by parallel.tp 3; choose a tp"),
        ("llama-3m", Mesh(pp=7), r"6 layers cannot fill parallel pp x virtual_stages = 7 x 1 = 7 chunks"),
        ("qwen2.5-14b", Mesh(tp=10), r"k_proj: 8 heads .* cannot be cut over tp=10"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(name, mesh, message):
    with pytest.raises(ValueError, match=message):
        build(name, World.sketch(mesh, 0), device="meta")


def test_the_flat_buffer_holds_every_parameter_apart_and_padding_stays_zero():
    model = build("llama-3m", dtype=torch.float32, seed=1)
    spans = sorted((slot.offset, slot.offset + slot.numel) for slot in model.slots)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    rest = model.weights.clone()
    for slot in model.slots:
        for part in slot.param.parts:
            part.view(rest[slot.offset : slot.offset + slot.numel]).zero_()
    assert not rest.any()
    assert all(slot.param.decay == (slot.offset < model.decay_end) for slot in model.slots)
