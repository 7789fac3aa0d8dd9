"""Random Llamas, Qwen 2.5s and Qwen 3s against `transformers`: logits, gradients, configuration, and back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from raytron.checkpoint import save_pretrained
from raytron.models import from_pretrained, read_arch
from raytron.models.arch import DecoderConfig, RopeScaling
from raytron.models.registry import PRESETS, family_of
from tests.models.hugging_face import FAMILIES, canonical, random_model, same_bits, sizes, stored

LENGTH = 20


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_every_tensor_equal_theirs(family):
    from transformers import AutoModelForCausalLM

    @settings(max_examples=15, deadline=None, phases=(Phase.reuse, Phase.generate))  # shrinking would take minutes
    @given(sizes((family,)), st.integers(0, 1000))
    def check(drawn, seed):
        theirs = random_model(drawn, seed)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = from_pretrained(folder)
            compare(ours, theirs, from_pretrained(folder, dtype=torch.float64), seed)
            save_pretrained(ours, Path(folder) / "again")
            assert same_bits(stored(Path(folder) / "again"), stored(folder))
            loaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "again")
            assert same_bits(loaded.state_dict(), theirs.state_dict())
            same_configuration(loaded.config.to_dict(), theirs.config.to_dict())

    check()


def compare(ours, theirs, exact, seed: int) -> None:
    """Logits within 1e-4; gradients as near to theirs as theirs are to float64's: a tiny norm amplifies rounding."""
    vocab = ours.arch.vocab_size
    tokens_BT = torch.randint(0, vocab, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    logits, wanted, precise = ours(tokens_BT), theirs(tokens_BT).logits, exact(tokens_BT)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    for out in (logits, wanted, precise):
        F.cross_entropy(out[:, :-1].reshape(-1, vocab), tokens_BT[:, 1:].reshape(-1)).backward()
    grads = {name: param.grad for name, param in theirs.named_parameters()}
    mine, truth = (canonical(model, lambda param: param.grad) for model in (ours, exact))
    assert mine.keys() == grads.keys()
    largest = max(grad.abs().max().item() for grad in grads.values())
    for name, grad in grads.items():  # some gradients (a key's bias) are what is left of terms that cancel
        rounding = (grad - truth[name]).abs().max().item()
        assert rounding < 1e-2 * largest, name
        limit = 1e-4 * grad.abs().max().item() + 1e-5 * largest + 4 * rounding
        torch.testing.assert_close(mine[name], grad, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


# The old spelling of rope is written beside the new one, for readers that know only that.
IRRELEVANT = {"_name_or_path", "transformers_version", "rope_theta", "rope_scaling"}


def same_configuration(found: dict, wanted: dict) -> None:
    keys = (wanted.keys() | found.keys()) - IRRELEVANT
    assert {key: found.get(key) for key in keys} == {key: wanted.get(key) for key in keys}


@given(st.data())
@settings(deadline=None)
def test_configurations_survive_in_the_old_spelling_and_the_new(data):
    drawn = data.draw(sizes())
    rope = drawn.pop("rope_parameters")
    scaling = RopeScaling(**{k: v for k, v in rope.items() if not k.startswith("rope_")}) if len(rope) > 2 else None
    family = drawn.pop("model_type")
    traits = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(family, {})
    arch = DecoderConfig(family=family, rope_theta=rope["rope_theta"], rope_scaling=scaling, **drawn, **traits)
    both = arch.to_hf()
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    new = {key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling")}
    for config in (both, old, new):
        assert family_of(arch).from_hf(json.loads(json.dumps(config))) == arch


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip_through_transformers(name):
    from transformers import AutoConfig

    config = AutoConfig.for_model(**PRESETS[name].to_hf()).to_dict()
    assert family_of(PRESETS[name]).from_hf(config) == PRESETS[name]


GOOD = DecoderConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1,
).to_hf()  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; families are llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; silu is"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope type 'linear' is not supported"),
        ({"attention_bias": True}, "attention_bias and mlp_bias are not supported"),
        ({"mlp_bias": True}, "attention_bias and mlp_bias are not supported"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": "2"}, r"num_attention_heads is '2'; expected int"),
        ({"num_key_value_heads": 3}, "num_attention_heads 2 is not divisible by num_key_value_heads 3"),
        ({"head_dim": 3}, "head_dim 3 must be even"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_configuration_cannot_have_is_named_with_the_file(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=rf"config.json: .*{message}"):
        read_arch(tmp_path)


def test_a_missing_or_damaged_configuration_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: not found; give a Hugging Face model directory"):
        read_arch(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json: (not valid JSON|model_type None)"):
            read_arch(tmp_path)


def test_defaults_of_an_old_configuration_are_transformers(tmp_path):
    """Fields that came later are absent there: heads of their own, no scaling, and the epsilon of the first Llama."""
    old = {k: v for k, v in GOOD.items() if k in DecoderConfig.__dataclass_fields__ or k == "model_type"}
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps"):
        del old[key]
    (tmp_path / "config.json").write_text(json.dumps(old))
    arch = read_arch(tmp_path)
    assert (arch.num_key_value_heads, arch.head_dim, arch.rope_theta, arch.rms_norm_eps) == (2, 4, 10000.0, 1e-6)


@pytest.mark.parametrize(("family", "trait"), [("llama", "qkv_bias"), ("llama", "qk_norm"), ("qwen3", "qkv_bias")])
def test_a_trait_the_family_lacks_is_not_lost_silently(family, trait):
    arch = DecoderConfig(family=family, qk_norm=family == "qwen3").replace(**{trait: True})
    with pytest.raises(ValueError, match=rf"{family} has {trait} False, not True"):
        arch.to_hf()
