"""What a decoder does whatever its weights: causality, documents apart, positions, attention and rotary formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import ParallelConfig
from raytron.models import build
from raytron.models.arch import DecoderConfig, RopeScaling
from raytron.models.layers import attention
from raytron.models.layers.attention import CoreAttention
from raytron.models.layers.rotary import frequencies, rotary_table, rotate
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from tests.models.hugging_face import canonical

LENGTH = 16
ARCHS = {
    "llama": DecoderConfig(
        vocab_size=37, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    ),
    "qwen3": DecoderConfig(
        family="qwen3", vocab_size=300, hidden_size=20, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
        tie_word_embeddings=True, qk_norm=True,
    ),
}  # fmt: skip


def model(name: str):
    return build(ARCHS[name], dtype=torch.float64, seed=5).requires_grad_(False)


def tokens(arch: DecoderConfig, seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, arch.vocab_size, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHS)
def test_a_token_changes_nothing_before_it_and_something_from_it_on(name):
    decoder = model(name)
    before_BT = tokens(decoder.arch, 1)
    logits = decoder(before_BT)
    for t in (0, 7, LENGTH - 1):
        after_BT = before_BT.clone()
        after_BT[0, t] = (after_BT[0, t] + 1) % decoder.arch.vocab_size
        changed = decoder(after_BT) != logits
        assert not changed[0, :t].any()
        assert not changed[1].any()
        assert changed[0, t:].any(-1).all()


@pytest.mark.parametrize("name", ARCHS)
def test_documents_of_a_packed_row_equal_separate_sequences(name):
    """Masked apart, with positions that start anew, each document gives the logits it gives alone."""
    decoder = model(name)
    row_BT = tokens(decoder.arch, 2, batch=1)
    lengths = (5, 1, 7, 3)
    documents_BT = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).int().unsqueeze(0)
    positions_BT = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = decoder(row_BT, positions_BT, documents_BT)
    alone = [decoder(part) for part in row_BT.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    torch.testing.assert_close(decoder(row_BT, documents_BT=torch.zeros(1, LENGTH)), decoder(row_BT))
    assert not torch.allclose(packed, decoder(row_BT, positions_BT))


@settings(max_examples=25)
@given(
    rows=st.lists(
        st.lists(st.integers(1, 40), min_size=1, max_size=9).filter(lambda row: sum(row) <= 64), min_size=1, max_size=3
    ),
    sharing=st.booleans(),
)
def test_documents_laid_side_by_side_attend_as_under_a_mask(rows, sharing):
    """Without a mask (a CPU, not compiled) logits and gradients are those with one; padding is a document too.

    Documents may continue the first of their row, as answers share a prompt.
    """
    decoder = build(ARCHS["llama"], dtype=torch.float64, seed=5)
    width = max(map(sum, rows))
    documents_BT = torch.full((len(rows), width), -1)
    positions_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for row, lengths in enumerate(rows):
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        documents_BT[row, : len(ids)] = ids
        positions_BT[row, : len(ids)] = torch.cat([torch.arange(n) for n in lengths])
    parents_BT = torch.where(documents_BT < 0, documents_BT, 0) if sharing else None
    tokens_BT = torch.arange(len(rows) * width).view(len(rows), width) % decoder.arch.vocab_size
    weights_TV = torch.randn(len(rows) * width, decoder.arch.vocab_size, dtype=torch.float64)
    found = []
    for decoder.compiled in (False, True):  # compiled models take the mask
        decoder.zero_grad()
        seq = decoder.sequences(len(rows), width, positions_BT, documents_BT, parents_BT)
        assert (seq.blocked is None) != decoder.compiled
        logits = decoder.chunks[0](tokens_BT.reshape(-1), seq)
        (logits * weights_TV).sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in decoder.parameters())])
    for apart, masked in zip(*found, strict=True):
        torch.testing.assert_close(apart, masked, rtol=1e-9, atol=1e-9)


def test_only_the_distance_of_positions_counts():
    decoder = model("llama")
    row_BT = tokens(decoder.arch, 3)
    shifted = torch.arange(LENGTH).expand(2, -1) + torch.tensor([[0], [40]])
    torch.testing.assert_close(decoder(row_BT, shifted), decoder(row_BT), rtol=1e-5, atol=1e-6)  # fp32 angles
    assert not torch.allclose(decoder(row_BT, 2 * shifted), decoder(row_BT), rtol=1e-3)


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize(
    ("mesh", "parallel"),
    [
        (Mesh(tp=4), ParallelConfig()),
        (Mesh(pp=2, tp=2), ParallelConfig(layers_per_stage=(1, 2), pp=2)),
        (Mesh(pp=3), ParallelConfig()),
        (Mesh(), ParallelConfig(virtual_stages=3)),
    ],
    ids=["tp4", "pp2-tp2", "pp3", "v3"],
)
def test_initial_weights_do_not_depend_on_the_layout(name, mesh, parallel):
    whole = canonical(build(ARCHS[name], seed=3))
    covered = dict.fromkeys(whole, 0)
    for rank in range(mesh.size):
        sketch = build(ARCHS[name], World.sketch(mesh, rank), parallel=parallel, seed=3)
        for slot in sketch.slots:
            for part in slot.param.parts:
                box = tuple(slice(a, b) for a, b in part.box)
                assert torch.equal(part.view(slot.param.data), whole[part.name][box])
                covered[part.name] += 0 if part.replica else part.view(slot.param.data).numel()
    assert all(covered[tensor] >= values.numel() for tensor, values in whole.items())


def test_a_stage_alone_is_not_a_model():
    sketch = build(ARCHS["llama"], World.sketch(Mesh(pp=2), 0))
    with pytest.raises(ValueError, match=r"holds one pipeline stage; run the model through TrainEngine"):
        sketch(torch.zeros(1, 4, dtype=torch.int64))


# Attention


def naive(q, k, v, blocked):
    """softmax(QK^T / sqrt(d)) V, head by head, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    _, S, N, d = q.shape
    k, v = (x.repeat_interleave(N // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bsnd,btnd->bnst", q, k) / d**0.5
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future if blocked is None else blocked | future, -torch.inf)
    return torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v)


def attention_case(length, heads, groups, d, masked, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, length, n, d) for n in (heads, groups, groups, heads)]
    q, k, v, pull = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    blocked = None
    if masked:
        documents = torch.randint(0, 2, (2, length), generator=generator).cumsum(1)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        blocked = ((documents[:, :, None] != documents[:, None, :]) | future).unsqueeze(1)
    return [x.requires_grad_() for x in (q, k, v)], pull, blocked


def compare_attention(inputs, pull, blocked, **tolerance):
    outputs = [attend(*inputs, blocked) for attend in (CoreAttention(), naive)]
    grads = [torch.autograd.grad(out, inputs, pull.to(out.dtype)) for out in outputs]
    for got, wanted in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        assert got.dtype == inputs[0].dtype
        torch.testing.assert_close(got.double(), wanted.double(), **tolerance)


@pytest.mark.parametrize("longest", [1024, 0], ids=["products", "fused"])
@settings(deadline=None, max_examples=20)
@given(
    length=st.sampled_from([1, 2, 17, 63, 64, 65, 130, 300]), groups=st.integers(1, 3), per_group=st.integers(1, 3),
    d=st.sampled_from([2, 8]), masked=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
def test_both_paths_of_attention_equal_the_formula(longest, length, groups, per_group, d, masked, seed):
    """Short sequences go through plain products in runs of queries, long ones through PyTorch's fused attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LONGEST_MATH", longest)
        case = attention_case(length, groups * per_group, groups, d, masked, seed)
        compare_attention(*case, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_half_precision_is_as_exact_as_its_inputs(masked):
    compare_attention(*attention_case(100, 4, 2, 8, masked, 1, torch.bfloat16), rtol=2e-2, atol=3e-2)


# Rotary positions


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    "scaling", [None, RopeScaling(), RopeScaling(32.0, 1.0, 4.0, 16), RopeScaling(2.0, 1.0, 2.0, 64)]
)
def test_rotary_tables_equal_transformers(theta, scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    arch = DecoderConfig(rope_theta=theta, rope_scaling=scaling, max_position_embeddings=131072)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**arch.to_hf()))
    inverse = frequencies(arch.head_dim, theta, scaling)
    torch.testing.assert_close(inverse, theirs.inv_freq, rtol=1e-6, atol=0)
    positions_BT = torch.tensor([[0, 1, 100, 8191, 131071], [5, 4, 3, 2, 1]])
    q = torch.randn(2, 5, 3, arch.head_dim, generator=torch.Generator().manual_seed(0))
    cos, sin = theirs(q, positions_BT)
    wanted, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    turned = rotate(q, *rotary_table(positions_BT, theirs.inv_freq, torch.float32))
    torch.testing.assert_close(turned, wanted.transpose(1, 2))


@given(st.integers(0, 100), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
@settings(deadline=None)
def test_products_depend_on_the_distance_only(seed, a, b, shift):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    inverse = frequencies(8, 10000.0, None)

    def product(i: int, j: int) -> float:
        turned = [rotate(x, *rotary_table(torch.tensor(p), inverse, torch.float64)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert product(a, b) == pytest.approx(product(a + shift, b + shift), abs=1e-4)
