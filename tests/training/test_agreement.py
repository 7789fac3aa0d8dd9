"""Replicas are compared before a step counts: a bit that flipped is found, named and mended, or nobody goes on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.config import GuardConfig
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh
from raytron.training.agreement import Copies, copies
from raytron.training.guard import ReplicasDisagree
from tests.training.engines import batches, bits, config, make


@given(st.lists(st.integers(0, 2), min_size=2, max_size=7))
def test_most_are_right_and_where_there_is_no_majority_nobody_is(sums):
    found = Copies("weights", dict(enumerate(sums)))
    value, count = Counter(sums).most_common(1)[0]
    assert found.agree == (count == len(sums))
    assert found.right == (value if 2 * count > len(sums) else None)
    assert all((sums[rank] != found.right) == (rank in found.odd) for rank in range(len(sums)))


@pytest.mark.parametrize("mesh", [Mesh(dp=3, tp=2), Mesh(dp=4), Mesh(dp=2, pp=2)])
def test_every_copy_is_compared_with_those_it_should_equal(mesh):
    """Rows whose checksums say what was hashed: the buffer, of which position in the pipeline and of which owner."""
    common, mirrored = ["weights"], ["exp_avg"]
    rows = []
    for rank in range(mesh.size):
        at, line = rank % mesh.unit, mesh.group("dp", rank)
        held = line[(line.index(rank) - mesh.dp // 2) % mesh.dp]
        rows.append([at, 100 + rank, 100 + held])
    found = list(copies(mesh, common, mirrored, rows))
    assert all(one.agree for one in found)
    assert sum(len(one.sums) for one in found) == 3 * mesh.size  # every checksum once
    rows[1][2] = -1
    (odd,) = [one for one in copies(mesh, common, mirrored, rows) if not one.agree]
    assert odd.name == "exp_avg"
    assert 1 in odd.sums


def flip(tensor: torch.Tensor, at: int) -> None:
    """The lowest bit of an element."""
    words = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    words[at] ^= 1


STEPS = 5


def run_flipped(world: World, chosen, guilty: int | None, buffer: str = "weights", before: int = 2):
    """A bit flips on rank `guilty` before step `before` + 1."""
    engine = make("untied", world, chosen)
    results = []
    (name, piece), *_ = [
        (slot.param.parts[0].name, slot) for slot in engine.model.slots if "down_proj" in slot.param.parts[0].name
    ]
    for step in range(STEPS):
        if step == before and world.rank == guilty:
            if buffer == "weights":
                flip(engine.model.weights, piece.offset + 7)
            else:
                flip(engine.optimizer[buffer], 0)
        try:
            results.append(engine.step(batches(engine, "untied", step)))
        except ReplicasDisagree as error:
            return str(error), step + 1, name
    told = [(repr(r.loss), repr(r.grad_norm)) for r in results]
    held = [bits(t) for t in (engine.model.weights, *engine.optimizer.values())]
    return told, held, [r.verdict for r in results], name


def comparing(mesh: Mesh, interval: int = 1, precision: str = "fp32", **parallel):
    guard = GuardConfig(agreement_interval=interval)
    return config(precision, parallel={"pp": mesh.pp, "tp": mesh.tp, **parallel}, guard=guard)


@pytest.mark.parametrize(
    ("mesh", "further", "guilty", "buffer"),
    [
        (Mesh(dp=3), {}, 1, "weights"),
        (Mesh(dp=4), {"precision": "bf16", "twins": True}, 3, "weights"),
        pytest.param(Mesh(dp=3), {"zero": False}, 0, "weights", marks=pytest.mark.slow),
        pytest.param(Mesh(dp=3), {"zero": False}, 2, "exp_avg", marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_is_named_and_mended_and_the_run_is_the_quiet_one(ranks, mesh, further, guilty, buffer):
    chosen = comparing(mesh, **further)
    hurt, quiet = (ranks.run(run_flipped, mesh, chosen, who, buffer) for who in (guilty, None))
    for mine, wanted in zip(hurt, quiet, strict=True):
        assert mine[:2] == wanted[:2]
        told, name = mine[2:]
        assert [verdict is None for verdict in told] == [True, True, False, True, True]
        found = told[2]
        assert (found.kind, found.ranks, found.mended, found.sure) == ("hardware", (guilty,), True, True)
        assert f"on rank {guilty} (" in found.tensor
        assert buffer != "weights" or f"weights of {name} " in found.tensor
        assert f"are not those of {mesh.dp - 1} replicas" in found.tensor
        assert set(wanted[2]) == {None}


@pytest.mark.parametrize(
    ("mesh", "further", "buffer", "named"),
    [
        (Mesh(dp=2), {}, "weights", (0, 1)),
        pytest.param(Mesh(dp=2, tp=2), {}, "weights", (1, 3), marks=pytest.mark.slow),
        pytest.param(Mesh(dp=4), {"twins": True}, "exp_avg_sq", (1, 3), marks=pytest.mark.slow),
    ],
)
def test_of_two_copies_nobody_knows_the_right_one(ranks, mesh, further, buffer, named):
    for error, step, name in ranks.run(run_flipped, mesh, comparing(mesh, **further), 1, buffer):
        assert step == 3
        assert f"{buffer} of {name if buffer == 'weights' else ''}" in error
        assert all(f"rank {rank} (" in error for rank in named)
        assert not any(f"rank {rank} (" in error for rank in set(range(mesh.size)) - set(named))
        assert "no majority" in error


def test_it_is_found_at_the_next_comparison(ranks):
    mesh = Mesh(dp=3)
    chosen = comparing(mesh, interval=4, zero=False)  # with ZeRO the next gather would have hidden it
    for _, _, told, _ in ranks.run(run_flipped, mesh, chosen, 1):
        assert [verdict is None for verdict in told] == [True, True, True, False, True]
        assert told[3].ranks == (1,)
