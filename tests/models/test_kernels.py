"""The CPU kernels against torch, and the property reproducible mode rests on: a row's bits depend on that row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.models import build, kernels
from raytron.models.arch import DecoderConfig
from raytron.models.layers import cache as paged
from raytron.models.layers.cache import Cache, PagedSequences

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")

DTYPES = st.sampled_from((torch.float32, torch.bfloat16))
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def close(mine: torch.Tensor, exact: torch.Tensor, terms: int = 1) -> None:
    """Within the rounding of the result, and of a sum of so many terms in fp32."""
    scale = exact.abs().max().item() + 1e-6
    limit = (ROUNDING[mine.dtype] + terms * 2e-7) * scale
    assert (mine.double() - exact).abs().max().item() <= limit


@given(st.data(), DTYPES)
@settings(deadline=None, max_examples=60)
def test_linear_equals_float64_and_rows_do_not_depend_on_each_other(data, dtype):
    M, N, K = (data.draw(st.integers(1, top)) for top in (70, 80, 150))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    wide = torch.randn(M, K + 3, generator=generator).to(dtype)
    x, w = wide[:, :K], torch.randn(N, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype) if data.draw(st.booleans()) else None
    y = kernels.linear(x, w, bias)
    close(y, x.double() @ w.double().T + (0 if bias is None else bias.double()), terms=K)
    split = data.draw(st.integers(0, M))
    parts = [kernels.linear(part, w, bias) for part in (x[:split], x[split:])]
    assert torch.equal(torch.cat(parts), y)
    columns = data.draw(st.integers(1, N))
    assert torch.equal(kernels.linear(x, w[:columns], None if bias is None else bias[:columns]), y[:, :columns])


@given(st.integers(1, 9), st.integers(1, 90), DTYPES, st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_norm_and_gate_equal_torch(rows, size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, size, generator=generator).to(dtype) for n in (rows, 1))
    exact = F.rms_norm(x.double(), (size,), weight[0].double(), 1e-5)
    close(kernels.rms_norm(x, weight[0], 1e-5), exact, terms=4)
    heads = x.view(1, rows, size)
    assert torch.equal(kernels.rms_norm(heads, weight[0], 1e-5)[0], kernels.rms_norm(x, weight[0], 1e-5))
    gates = torch.randn(rows, 2 * size, generator=generator).mul_(20).to(dtype)
    gate, up = gates.double().chunk(2, -1)
    close(kernels.swiglu(gates), F.silu(gate) * up, terms=4)


def test_extreme_gates_stay_finite_and_nan_stays_nan():
    gates = torch.tensor([[-1e4, -200.0, -88.5, 88.5, 1e4, torch.nan] + [1.0] * 6])
    y = kernels.swiglu(gates)[0]
    assert y[:3].abs().max() < 1e-30
    assert torch.equal(y[3:5], gates[0, 3:5])
    assert y[5].isnan()


def batch(arch: DecoderConfig, model, lengths: list[int], block: int, dtype: torch.dtype, seed: int):
    """Tokens of several sequences in shuffled blocks: (paged sequences over `layer`, qk, v)."""
    generator = torch.Generator().manual_seed(seed)
    layer = model.cached_layers[0]
    per = [-(-n // block) for n in lengths]
    blocks = torch.randperm(sum(per), generator=generator).int().split(per)
    tables = torch.zeros(len(lengths), max(per), dtype=torch.int32)
    for row, mine in enumerate(blocks):
        tables[row, : len(mine)] = mine
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    position = torch.cat([torch.arange(n) for n in lengths]).int()
    T, N, K, d = len(position), arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
    qkv = torch.randn(T, N + 2 * K, d, generator=generator).to(dtype)
    cache = Cache.of(layer, sum(per), block, dtype, torch.device("cpu"))
    seq = PagedSequences(sequence, position, tables, {layer: cache}, *model.rotary(max(lengths)))
    return layer, seq, *qkv.split((N + K, K), dim=1)


@given(
    st.lists(st.integers(1, 75), min_size=1, max_size=4),
    st.sampled_from(((4, 2, 6), (4, 1, 20), (2, 2, 32), (6, 2, 64))),
    st.sampled_from((32, 64)),
    DTYPES,
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_attention_equals_the_training_layer_and_its_torch_twin(lengths, heads, block, dtype, seed):
    N, K, d = heads
    arch = DecoderConfig(
        vocab_size=8, hidden_size=N * d, intermediate_size=8, num_hidden_layers=1, num_attention_heads=N,
        num_key_value_heads=K, head_dim=d, max_position_embeddings=128,
    )  # fmt: skip
    model = build(arch, dtype=dtype)
    layer, seq, qk, v = batch(arch, model, lengths, block, dtype, seed)
    out = seq.attend(layer, qk, v)
    q, k = qk.split((N, K), dim=1)
    cache = Cache.of(layer, seq.caches[layer].keys.shape[0], block, dtype, torch.device("cpu"))
    twin = paged._attend(q, k, v, cache, seq.cos, seq.sin, seq.sequence_T, seq.position_T, seq.tables)
    exact = build(arch, dtype=torch.float64)
    wanted = [
        exact.sequences(1, len(a)).attend(exact.cached_layers[0], a.double(), b.double())
        for a, b in zip(qk.split(lengths), v.split(lengths), strict=True)
    ]
    for mine in (out, twin):
        limit = {torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
        assert (mine.double() - torch.cat(wanted)).abs().max() < limit
    early = seq.position_T < seq.position_T.max() // 2  # the same rows in two steps
    again = torch.empty_like(out)
    for mask in (early, ~early):
        if mask.any():
            part = PagedSequences(
                seq.sequence_T[mask], seq.position_T[mask], seq.tables, {layer: cache}, seq.cos, seq.sin
            )
            again[mask] = part.attend(layer, qk[mask], v[mask])
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_reproducible_model_learns_as_the_ordinary_one(family, dtype):
    """The same logits and gradients, up to rounding; documents apart, each with the bits it has alone."""
    traits = {"qk_norm": True, "qkv_bias": True, "head_dim": 12} if family == "qwen3" else {}
    arch = DecoderConfig(
        family=family, vocab_size=97, hidden_size=64, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, **traits,
    )  # fmt: skip
    plain, model = (build(arch, dtype=dtype, seed=0) for _ in range(2))
    model.use_kernels(reproducible=True)
    tokens = torch.randint(0, 97, (2, 70), generator=torch.Generator().manual_seed(1))
    for one in (plain, model):
        one(tokens).float().square().mean().backward()
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for mine, theirs in zip(model.slots, plain.slots, strict=True):
        a, b = mine.param.grad.float(), theirs.param.grad.float()
        assert (a - b).norm() <= limit * b.norm()
    documents = (torch.arange(70) >= 40).int().expand(2, -1)
    positions = torch.cat((torch.arange(40), torch.arange(30))).expand(2, -1)
    with torch.no_grad():
        whole = model(tokens, positions, documents)
        assert torch.equal(whole[:, :40], model(tokens)[:, :40])
        assert torch.equal(whole[1:, 40:], model(tokens[1:, 40:]))
    with pytest.raises(ValueError, match="reset_position_ids"):
        model(tokens, None, documents)


def test_reproducible_mode_says_what_it_needs():
    arch = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1)  # fmt: skip
    with pytest.raises(ValueError, match="fp32 or bf16 on the CPU"):
        build(arch, dtype=torch.float64).use_kernels(reproducible=True)
