"""Adapters compute what PEFT's do, and are what the chain rule makes of the merged weights' gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from raytron.checkpoint import save_adapter, save_pretrained
from raytron.config import LINEAR, LoRAConfig, ModelConfig
from raytron.models import begin, build, from_pretrained, load_adapter, resolve
from raytron.models.adapters import from_peft, to_peft
from raytron.models.arch import DecoderConfig
from tests.models.hugging_face import canonical, random_model, same_bits, stored

SIZES = {
    "model_type": "qwen3", "vocab_size": 41, "hidden_size": 24, "head_dim": 8, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
ARCH = DecoderConfig(
    vocab_size=37, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
)  # fmt: skip
SOME = [
    LoRAConfig(rank=3, alpha=5),
    LoRAConfig(rank=4, alpha=8, rslora=True, target_modules=("q_proj", "v_proj", "down_proj")),
]


def tokens(vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (2, 14), generator=torch.Generator().manual_seed(seed))


def loss(logits: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), given[:, 1:].reshape(-1))


def trained(model, seed: int = 5):
    """The model with adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    for slot in model.trained:
        slot.param.data.add_(torch.randn(slot.param.shape, generator=generator) * 0.1)
    return model


def made(lora: LoRAConfig, dtype=torch.float64, arch: DecoderConfig = ARCH, seed: int = 3):
    return build(replace(arch, lora=lora), dtype=dtype, seed=seed)


@pytest.mark.parametrize("lora", SOME, ids=["all", "some"])
def test_logits_and_gradients_are_those_of_the_merged_weights(lora: LoRAConfig):
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, where W is the weight with the adapter merged into it."""
    model, plain = trained(made(lora)), build(ARCH, dtype=torch.float64)
    plain.weights[: model.frozen] = model.merged()[: model.frozen]
    given = tokens(ARCH.vocab_size)
    ours, theirs = model(given), plain(given)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    loss(ours, given).backward()
    loss(theirs, given).backward()
    values, grads = canonical(model), canonical(model, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    dense = canonical(plain, lambda p: p.grad)
    adapters = {name.rpartition(".lora_")[0] for name in values if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapters} == {*lora.targets}
    for name in adapters:
        a, b, dW = values[f"{name}.lora_A.weight"], values[f"{name}.lora_B.weight"], dense[f"{name}.weight"]
        torch.testing.assert_close(grads[f"{name}.lora_A.weight"], lora.scale * b.mT @ dW, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(grads[f"{name}.lora_B.weight"], lora.scale * dW @ a.mT, rtol=1e-8, atol=1e-12)
    assert all(slot.param.grad is None for slot in model.slots if slot.offset < model.frozen)


def test_adapters_begin_as_pefts_and_change_nothing():
    model, plain = made(SOME[0]), build(ARCH, dtype=torch.float64, seed=3)
    given = tokens(ARCH.vocab_size)
    assert torch.equal(model(given), plain(given))
    values = canonical(model)
    for name, value in values.items():
        if "lora_B" in name:
            assert not value.any()
        elif "lora_A" in name:
            bound = value.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
            assert 0.8 * bound < value.abs().max() <= bound
            assert abs(float(value.mean())) < bound / 3
    assert len({float(value[0, 0]) for name, value in values.items() if "lora_A" in name}) == 2 * len(LINEAR)
    trained(model)
    with model.without_adapters():
        assert torch.equal(model(given), plain(given))
    assert not torch.equal(model(given), plain(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_bits_depend_on_the_tokens_before_it_alone_in_reproducible_mode(dtype):
    model = trained(made(SOME[0], dtype)).use_kernels(reproducible=True)
    given = tokens(ARCH.vocab_size)
    with torch.no_grad():
        whole = model(given)
        assert torch.equal(model(given[1:, :9]), whole[1:, :9])
    assert torch.equal(model(given), whole)  # with gradients
    fast = trained(made(SOME[0], dtype)).use_kernels(reproducible=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(given), whole, rtol=0, atol={torch.float32: 1e-4, torch.bfloat16: 0.25}[dtype])


def test_peft_computes_the_same_and_each_reads_the_others_files(tmp_path: Path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    theirs = random_model(SIZES, 1)
    theirs.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(2)
    for name, param in wrapped.named_parameters():
        if "lora_B" in name:
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    wrapped.save_pretrained(tmp_path / "theirs")
    config = ModelConfig(path=str(tmp_path / "base"), lora=LoRAConfig(path=str(tmp_path / "theirs")))
    arch = resolve(config)
    assert (arch.lora.rank, arch.lora.alpha, arch.lora.targets) == (4, 6, LINEAR)

    ours, given = begin(config, arch, dtype=torch.float64), tokens(SIZES["vocab_size"])
    exact = wrapped.double()  # but for rotary tables and norms, which transformers computes in fp32
    logits, wanted = ours(given), exact(given).logits
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    loss(logits, given).backward()
    loss(wanted, given).backward()
    mine = canonical(ours, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    grads = {name: param.grad for name, param in exact.named_parameters() if param.grad is not None}
    assert len(grads) == 2 * 2 * len(LINEAR)
    for name, grad in grads.items():
        own = name.removeprefix("base_model.model.").replace(".default", "")
        assert (mine[own] - grad).norm() < 1e-5 * grad.norm(), name

    single = begin(config, arch)
    save_adapter(single, tmp_path / "ours")
    assert same_bits(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(given).logits, single(given), rtol=0, atol=1e-4)
        save_pretrained(single, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(given).logits, again(given).logits, rtol=0, atol=1e-4)


def test_a_merged_directory_is_a_complete_model(tmp_path: Path):
    model = trained(made(SOME[0], torch.float32))
    save_pretrained(model, tmp_path / "merged")
    plain, given = from_pretrained(tmp_path / "merged"), tokens(ARCH.vocab_size)
    assert plain.arch == ARCH
    with torch.no_grad():
        torch.testing.assert_close(plain(given), model(given), rtol=0, atol=1e-5)


def test_adapters_come_back_to_the_bit(tmp_path: Path):
    model = trained(made(SOME[1], torch.float32))
    save_adapter(model, tmp_path)
    other = made(SOME[1], torch.float32, seed=3)
    load_adapter(other, tmp_path)
    assert torch.equal(other.weights, model.weights)
    names = set(stored(tmp_path))
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 2 * 3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 4, 8, True)
    assert from_peft(config) == replace(SOME[1], target_modules=SOME[1].targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, r"adapter_config.json: peft_type 'LOHA' is not supported"),
        ({"use_dora": True}, r"use_dora True is not supported; merge the adapter with PEFT"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern .* is not supported"),
        ({"target_modules": ["lm_head"]}, r"target_modules \['lm_head'\] are not supported; q_proj, k_proj"),
        ({"target_modules": "q.*"}, r"target_modules 'q.\*' is not supported; a list of q_proj"),
        ({"r": 5}, r"lora_A.weight"),
        ({"target_modules": ["q_proj"]}, r"\.lora_.\.weight is not one of the model's adapters"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_something_else_is_refused(tmp_path: Path, change: dict, message: str):
    model = made(SOME[0], torch.float32)
    save_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**to_peft(model.arch), **change}))
    config = ModelConfig(preset="llama-3m", lora=LoRAConfig(path=str(tmp_path)))

    def start() -> None:
        begin(config, replace(ARCH, lora=resolve(config).lora))

    with pytest.raises(ValueError, match=message):
        start()


def test_what_is_asked_for_beside_a_directory_must_be_what_it_has(tmp_path: Path):
    save_adapter(made(SOME[0], torch.float32), tmp_path)
    same = LoRAConfig(rank=3, alpha=5, target_modules=LINEAR, path=str(tmp_path))
    assert resolve(ModelConfig(preset="llama-3m", lora=same)).lora.rank == 3
    with pytest.raises(ValueError, match=r"rank 3, alpha 5.0, .*asked for is rank 8, .*leave out all but lora.path"):
        resolve(ModelConfig(preset="llama-3m", lora=LoRAConfig(rank=8, path=str(tmp_path))))
    with pytest.raises(ValueError, match=r"no adapters to save"):
        save_adapter(build(ARCH, seed=0), tmp_path / "none")
