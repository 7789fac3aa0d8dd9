"""Shards that are kept twice: what is trained is the same to the bit, both copies are, and checkpoints know one."""

from __future__ import annotations

import pytest
import torch

from raytron.checkpoint import CheckpointManager
from raytron.config import ParallelConfig
from raytron.parallel.collectives import World
from raytron.parallel.data import held_intervals, twin_position
from raytron.parallel.layout import fragile
from raytron.parallel.mesh import Mesh
from raytron.training.twins import shard_checksums, twins_that_differ
from tests.training.engines import batches, bits, canonical, config, make

MESHES = [Mesh(dp=2), Mesh(dp=3), Mesh(dp=4), Mesh(dp=2, tp=2), Mesh(dp=2, pp=2)]
QUICK = (("fp32", 2), ("bf16", 3), ("fp64", 2))


def run_twins(world: World, precision: str, twins: bool):
    """Bits of the weights, results, and whether the copies agree, with a bad step in between."""
    mesh = world.mesh
    chosen = config(precision, parallel={"pp": mesh.pp, "tp": mesh.tp, "twins": twins})
    engine = make("tied", world, chosen)
    results = [engine.step(batches(engine, "tied", step)) for step in range(2)]
    hook = engine.model.trained[0].param.register_hook(lambda grad: grad * torch.nan)
    results.append(engine.step(batches(engine, "tied", 2)))
    hook.remove()
    results.append(engine.step(batches(engine, "tied", 3)))
    held = {key: bits(values) for key, values in canonical(engine).items()}
    told = [(r.step, repr(r.loss), repr(r.grad_norm), r.skipped) for r in results]
    agree = twins_that_differ(engine)
    mirrored = any(mirror for _, mirror in shard_checksums(engine).values())
    spoiled: list[str] = []
    if engine.twins:
        if world.rank == 0:
            engine.optimizer["exp_avg"][engine.owned] += 1  # the first that is mirrored
        spoiled = twins_that_differ(engine)
    return held, told, agree, mirrored, spoiled


@pytest.mark.parametrize(
    ("mesh", "precision"),
    [
        (mesh, precision) if (precision, mesh.size) in QUICK else pytest.param(mesh, precision, marks=pytest.mark.slow)
        for mesh in MESHES
        for precision in ("fp32", "bf16", "fp64")
    ],
    ids=lambda value: value if isinstance(value, str) else f"dp{value.dp}-pp{value.pp}-tp{value.tp}",
)
def test_twins_train_the_same_bits_and_agree_to_the_bit(ranks, mesh, precision):
    alone, both = (ranks.run(run_twins, mesh, precision, twins) for twins in (False, True))
    for (held, told, agree, mirrored, _), (wanted, expected, *_) in zip(both, alone, strict=True):
        assert held == wanted
        assert told == expected
        assert told[2][3] == "non-finite"
        assert agree == []
        assert mirrored
    assert not any(mirrored for _, _, _, mirrored, _ in alone)
    assert {name for *_, spoiled in both for name in spoiled} == {"exp_avg"}


def layout_of(world: World):
    return make("tied", world, config(parallel={"twins": True})).optimizer_layout()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_shard_has_two_owners_on_different_halves(ranks, size):
    layout = ranks.run(layout_of, Mesh(dp=size))[0].check()
    assert fragile(layout) == {}
    if size == 4:  # the first two ranks on one node, the others on another
        assert fragile(layout, lambda place: "first" if place in ("rank-0", "rank-1") else "second") == {}
    held = [held_intervals([(0, 64 * size)], size, index, True) for index in range(size)]
    for index in range(size):
        own, mirror = held[index][0], held[twin_position(index, size)][1]
        assert own == mirror
        assert twin_position(twin_position(index, size), size, back=True) == index


def save(world: World, folder: str, twins: bool) -> list[bytes]:
    engine = make("untied", world, config("bf16", parallel={"twins": twins}))
    engine.step(batches(engine, "untied", 0))
    manager = CheckpointManager(folder, asynchronous=twins)
    assert manager.save(engine).result().ok
    return [bits(values) for values in canonical(engine).values()]


def load(world: World, folder: str) -> tuple[list[bytes], list[str], float]:
    """A fresh engine with twins, from any checkpoint: its weights, copies that differ, and its next loss."""
    engine = make("untied", world, config("bf16", parallel={"twins": True}), seed=1)
    engine.record = CheckpointManager(folder).load(engine)
    weights = [bits(values) for values in canonical(engine).values()]
    return weights, twins_that_differ(engine), engine.step(batches(engine, "untied", 1)).loss


def test_checkpoints_are_the_same_with_twins_and_without(ranks, tmp_path):
    folders = {twins: tmp_path / f"twins-{twins}" for twins in (False, True)}
    saved = {twins: ranks.run(save, Mesh(dp=4), str(folder), twins) for twins, folder in folders.items()}
    assert saved[True] == saved[False]
    written = {
        twins: {path.relative_to(folder): path.read_bytes() for path in folder.rglob("step*/*/*")}
        for twins, folder in folders.items()
    }
    assert written[True] == written[False]
    assert len(written[True]) > 4
    for size in (4, 3):
        answers = [ranks.run(load, Mesh(dp=size), str(folder)) for folder in folders.values()]
        assert answers[0] == answers[1]
        for weights, differ, _ in answers[0]:
            assert weights == saved[True][0]
            assert differ == []


def test_twins_are_of_zeros_shards():
    with pytest.raises(ValueError, match=r"with parallel.zero off .* leave parallel.twins off too"):
        ParallelConfig(zero=False, twins=True)
    engine = make(chosen=config(parallel={"twins": True}))  # alone there is nobody to mirror
    assert not engine.twins
    assert twins_that_differ(engine) == []
