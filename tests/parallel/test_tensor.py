"""Layers cut over tp against the dense layer in float64: outputs, gradients of inputs and of every weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raytron.parallel.collectives import Axis, World
from raytron.parallel.mesh import Mesh
from raytron.parallel.tensor import (
    ColumnParallelLinear,
    Cut,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    initialize_,
    parameter,
    rows,
    vocab_parallel_cross_entropy,
    vocabulary_share,
)
from raytron.parallel.weight_grad import WeightGradQueue

TOKENS, HIDDEN = 8, 6
# Four heads of query, two of key, one of value: at tp 4 keys are held twice and values four times.
SIZES = {"q": 16, "k": 8, "v": 4}
HEAD = 4


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def canonical(vocab: int) -> dict[str, torch.Tensor]:
    shapes = {f"{name}.weight": (size, HIDDEN) for name, size in SIZES.items()}
    shapes |= {f"{name}.bias": (size,) for name, size in SIZES.items()}
    shapes |= {"row.weight": (HIDDEN, SIZES["q"]), "embed.weight": (vocab, HIDDEN)}
    return {name: normal(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(shapes.items())}


def make(kind: str, tp: Axis, sequence_parallel: bool, vocab: int) -> nn.Module:
    options = {"sequence_parallel": sequence_parallel, "std": 1.0}
    if kind == "column":
        cuts = [Cut.even(name, size, tp, unit=HEAD) for name, size in SIZES.items()]
        return ColumnParallelLinear("", cuts, HIDDEN, tp, bias=True, **options)
    if kind == "row":
        return RowParallelLinear("row", SIZES["q"], HIDDEN, tp, **options)
    embedding = VocabParallelEmbedding("embed", vocab, HIDDEN, tp, **options)
    if kind == "embedding":
        return embedding
    return VocabParallelHead("embed", vocab, HIDDEN, tp, tied=embedding, **options)


def cut(x: torch.Tensor, box) -> torch.Tensor:
    return x[tuple(slice(a, b) for a, b in box)]


def columns(x: torch.Tensor, start: int, size: int) -> torch.Tensor:
    return x[:, start : start + size]


def ends(kind: str, layer: nn.Module, tp: Axis, sequence_parallel: bool, vocab: int):
    """(this rank's input, the gradient of its output), cut from those of the dense layer."""
    split = (lambda x: x.chunk(tp.size)[tp.index]) if sequence_parallel else (lambda x: x)
    inputs, pulls = dense_ends(kind, vocab)
    if kind == "column":
        share = []
        for name, size in SIZES.items():
            mine = Cut.even(name, size, tp, unit=HEAD)
            # What replicas pull with adds up to the whole: 1/10, 2/10, ... and the rest.
            weight = 0.1 * (mine.replica + 1)
            if mine.replica == mine.replicas - 1:
                weight = 1 - sum(0.1 * (r + 1) for r in range(mine.replica))
            share.append(weight * columns(pulls[name], mine.start, mine.rows))
        return split(inputs), torch.cat(share, 1)
    if kind == "row":
        per = SIZES["q"] // tp.size
        return columns(inputs, tp.index * per, per), split(pulls)
    if kind == "embedding":
        return inputs, split(pulls)
    return split(inputs), columns(pulls, layer.start, layer.real)


def dense_ends(kind: str, vocab: int):
    x = normal(TOKENS, HIDDEN, seed=50)
    if kind == "column":
        return x, {name: normal(TOKENS, size, seed=60 + size) for name, size in SIZES.items()}
    if kind == "row":
        return normal(TOKENS, SIZES["q"], seed=51), normal(TOKENS, HIDDEN, seed=70)
    if kind == "embedding":
        return torch.arange(TOKENS) * 5 % vocab, normal(TOKENS, HIDDEN, seed=71)
    return x, normal(TOKENS, vocab, seed=72)


def dense(kind: str, vocab: int):
    """(output, gradient of the input, gradients of weights) of the whole layer."""
    weights, (inputs, pulls) = canonical(vocab), dense_ends(kind, vocab)
    x = inputs.clone().requires_grad_() if inputs.is_floating_point() else inputs
    if kind == "column":
        outputs = {name: F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in SIZES}
        torch.autograd.backward(list(outputs.values()), list(pulls.values()))
    else:
        weight = weights["row.weight"] if kind == "row" else weights["embed.weight"]
        outputs = F.embedding(x, weight) if kind == "embedding" else F.linear(x, weight)
        outputs.backward(pulls)
    return outputs, x.grad, {name: w.grad for name, w in weights.items() if w.grad is not None}


def run_layer(world: World, kind: str, sequence_parallel: bool, vocab: int, mode: str):
    """One rank: its output, input gradient, and (name, box, replicas) -> weight gradient."""
    tp, weights = world.axis("tp"), canonical(vocab)
    layer = make(kind, tp, sequence_parallel, vocab).double()
    for param in layer.parameters():
        param.data.zero_()
        for part in param.parts:
            part.view(param.data).copy_(cut(weights[part.name], part.box))
    x, pull = ends(kind, layer, tp, sequence_parallel, vocab)
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    queue = None
    if mode != "plain":
        queue = layer.queue = WeightGradQueue()
    y = layer(x)
    if mode == "deferred":
        with queue.collect("later"):
            y.backward(pull)
        assert all(param.grad is None for param in layer.parameters())
        queue.flush("later")
    else:
        y.backward(pull)
    grads = {}
    for param in layer.parameters():
        rest = param.grad.clone()
        for part in param.parts:
            assert part.partial == (part.replicas > 1)
            grads[part.name, part.box] = part.view(param.grad).numpy()
            part.view(rest).zero_()
        assert not rest.any(), "padding has a gradient"
    return y.detach().numpy(), None if x.grad is None else x.grad.numpy(), grads


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence-parallel"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    ("kind", "vocab"), [("column", 37), ("row", 37), ("embedding", 37), ("embedding", 5), ("head", 37), ("head", 5)]
)
def test_cut_layers_equal_the_dense_one(ranks, kind, tp, sequence_parallel, vocab):
    """Five rows of vocabulary leave ranks with padding only."""
    modes = ["plain"] if kind == "embedding" else ["plain", "inactive", "deferred"]
    outputs, grad_x, grad_weights = dense(kind, vocab)
    for mode in modes:
        answers = ranks.run(run_layer, Mesh(tp=tp), kind, sequence_parallel, vocab, mode)
        ys = [torch.from_numpy(y) for y, _, _ in answers]
        check_outputs(kind, ys, outputs, sequence_parallel, vocab)
        if grad_x is not None:
            joined = [torch.from_numpy(g) for _, g, _ in answers]
            cut_by_rows = sequence_parallel and kind != "row"
            whole = torch.cat(joined, 1) if kind == "row" else torch.cat(joined) if cut_by_rows else None
            for got in joined if whole is None else [whole]:
                torch.testing.assert_close(got, grad_x)
        check_weights([grads for _, _, grads in answers], grad_weights)


def check_outputs(kind, ys, outputs, sequence_parallel, vocab):
    if kind == "column":
        for rank, y in enumerate(ys):
            tp = Axis("tp", tuple(range(len(ys))), rank, {}, None)
            mine = [Cut.even(name, size, tp, unit=HEAD) for name, size in SIZES.items()]
            torch.testing.assert_close(y, torch.cat([columns(outputs[c.name], c.start, c.rows) for c in mine], 1))
    elif kind == "head":
        torch.testing.assert_close(torch.cat(ys, 1), outputs)
    else:
        for y in [torch.cat(ys)] if sequence_parallel else ys:
            torch.testing.assert_close(y, outputs)


def check_weights(ranks: list[dict], wanted: dict[str, torch.Tensor]) -> None:
    """Replicas of one box hold shares of its gradient; boxes cover every tensor."""
    boxes: dict[tuple, torch.Tensor] = {}
    for grads in ranks:
        for key, grad in grads.items():
            boxes[key] = boxes.get(key, 0) + torch.from_numpy(grad)
    assert {name for name, _ in boxes} == wanted.keys()
    for name, grad in wanted.items():
        assert sum(got.numel() for (other, _), got in boxes.items() if other == name) == grad.numel()
    for (name, box), got in boxes.items():
        torch.testing.assert_close(got, cut(wanted[name], box))


def run_cross_entropy(world: World, vocab: int, scale: float, dtype: torch.dtype):
    tp = world.axis("tp")
    start, real, _ = vocabulary_share(vocab, tp)
    logits, labels, pull = loss_inputs(vocab, scale, dtype)
    mine = columns(logits, start, real).clone().requires_grad_()
    nll = vocab_parallel_cross_entropy(mine, labels, start, tp)
    nll.backward(pull.to(nll.dtype))
    return nll.detach().numpy(), mine.grad.float().numpy() if dtype == torch.bfloat16 else mine.grad.numpy()


def loss_inputs(vocab: int, scale: float, dtype: torch.dtype):
    logits = (scale * normal(TOKENS, vocab, seed=80)).to(dtype)
    return logits, torch.arange(TOKENS) * 7 % vocab, normal(TOKENS, seed=81)


@pytest.mark.parametrize(
    ("tp", "vocab", "scale", "dtype"),
    [
        (2, 37, 1.0, torch.float64),
        (4, 37, 1.0, torch.float64),
        (4, 5, 1.0, torch.float64),
        (4, 37, 1e4, torch.float64),  # exponentials would overflow
        (4, 37, 1.0, torch.bfloat16),
    ],
    ids=str,
)
def test_vocabulary_parallel_cross_entropy(ranks, tp, vocab, scale, dtype):
    logits, labels, pull = loss_inputs(vocab, scale, dtype)
    logits.requires_grad_()
    wanted = F.cross_entropy(logits.double(), labels, reduction="none")
    wanted.backward(pull)
    low = dtype == torch.bfloat16  # computed in fp32, gradients rounded to bf16
    answers = ranks.run(run_cross_entropy, Mesh(tp=tp), vocab, scale, dtype)
    for nll, _ in answers:
        torch.testing.assert_close(torch.from_numpy(nll).double(), wanted, rtol=1e-6 if low else 1e-12, atol=1e-9)
    grad = torch.cat([torch.from_numpy(g) for _, g in answers], 1)
    torch.testing.assert_close(grad.double(), logits.grad.double(), rtol=1e-2 if low else 1e-12, atol=1e-9)


# Declarations


@given(st.integers(1, 200), st.integers(1, 16))
def test_vocabulary_shares_partition_the_vocabulary(vocab, tp):
    shares = [vocabulary_share(vocab, Axis("tp", tuple(range(tp)), i, {}, None)) for i in range(tp)]
    assert [row for start, real, _ in shares for row in range(start, start + real)] == list(range(vocab))
    (padded,) = {padded for _, _, padded in shares}
    assert padded % 8 == 0
    assert all(real <= padded for _, real, _ in shares)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 4))
def test_a_cut_covers_every_block_equally_often_or_is_refused(blocks, tp, unit):
    lines = [Axis("tp", tuple(range(tp)), i, {}, None) for i in range(tp)]
    if blocks % tp and tp % blocks:
        with pytest.raises(ValueError, match=rf"k: {blocks} heads .* cannot be cut over tp={tp}; choose a tp"):
            Cut.even("k", blocks * unit, lines[0], unit=unit)
        return
    cuts = [Cut.even("k", blocks * unit, line, unit=unit) for line in lines]
    held = sorted((row, c.replica) for c in cuts for row in range(c.start, c.start + c.rows))
    (replicas,) = {c.replicas for c in cuts}
    assert held == [(row, replica) for row in range(blocks * unit) for replica in range(replicas)]


def test_row_parallel_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match=r"o_proj: 6 input features cannot be cut over tp=4"):
        RowParallelLinear("o_proj", 6, 4, Axis("tp", (0, 1, 2, 3), 0, {}, None), sequence_parallel=False, std=1.0)


@given(st.integers(1, 700), st.data())
def test_initial_values_do_not_depend_on_the_cut(height, data):
    start = data.draw(st.integers(0, height - 1))
    stop = data.draw(st.integers(start + 1, height))
    whole = parameter((height, 3), [rows("w", (height, 3), 0, height)], decay=True, std=0.5)
    part = parameter((stop - start, 3), [rows("w", (height, 3), start, stop)], decay=True, std=0.5)
    other = parameter((height, 3), [rows("x", (height, 3), 0, height)], decay=True, std=0.5)
    for param in (whole, part, other):
        initialize_(param, seed=3)
    assert torch.equal(part, whole[start:stop])
    assert not torch.equal(whole, other)
    before = whole.detach().clone()
    initialize_(whole, seed=4)
    assert not torch.equal(whole, before)


def test_initial_values_have_the_declared_deviation():
    param = parameter((1000, 50), [rows("w", (1000, 50), 0, 1000)], decay=True, std=0.02)
    initialize_(param, seed=1)
    assert param.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(param.mean().item()) < 5 * 0.02 / 50000**0.5
    norm = parameter((7,), [rows("n", (7,), 0, 7)], decay=False, std=None)
    initialize_(norm, seed=1)
    assert norm.tolist() == [1.0] * 7
