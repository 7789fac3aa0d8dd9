"""Data or hardware: who is blamed for bad numbers, and that a step mended is the step of a quiet run, to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.config import GuardConfig
from raytron.data.loader import MicroBatch
from raytron.parallel.collectives import World
from raytron.parallel.data import twin_position
from raytron.parallel.mesh import Mesh
from raytron.training import TrainEngine
from raytron.training.commit import Redo
from raytron.training.guard import ReplicasDisagree, Verdict
from raytron.training.losses import NextToken
from raytron.training.recheck import (
    Elsewhere,
    Reading,
    Trace,
    _batch,
    _tensors,
    compare_elsewhere,
    differed_in_place,
)
from raytron.training.seating import seat
from tests.training.crews import Crew, Dropped, Task, all_of, apart
from tests.training.engines import ARCHS, batches, bits, config, global_batch, make

MESHES = st.builds(Mesh, dp=st.integers(1, 5), pp=st.integers(1, 2), tp=st.integers(1, 2))

# Whom to blame, given what was seen


def reading(what: object, norm: float = 1.0, loss: float = 1.0) -> Reading:
    return Reading(str(what), norm, loss)


@given(MESHES, st.sampled_from(["replicated", "zero", "twins"]), st.data())
def test_a_number_that_changed_is_traced_to_the_rank_that_added_it(mesh, kind, data):
    """Whatever shard it is in; other ranks are named besides only where the reduction has left no trace of theirs."""
    guilty, shard = data.draw(st.integers(0, mesh.size - 1)), data.draw(st.integers(0, mesh.dp - 1))
    lines = {rank: line for line in mesh.groups("dp") for rank in line}
    traces: list[list[Trace]] = [[], []]
    hidden = []
    for rank, line in sorted(lines.items()):
        at = mesh.coords(rank).dp
        twin = line[twin_position(at, mesh.dp)]
        hidden.append({"replicated": line, "zero": (rank,), "twins": (rank, twin)}[kind])
        overwritten = {"replicated": range(mesh.dp), "zero": [at], "twins": [at, twin_position(at, mesh.dp, True)]}
        seen = rank == guilty and shard not in overwritten[kind]
        for run in (0, 1):
            own, summed = ("spoilt", run) if seen else 0, ("spoilt", run) if guilty in line and at == shard else 0
            traces[run].append(Trace(reading(own), reading(summed)))
    found = differed_in_place(mesh, *traces, hidden, 0.0)
    assert guilty in found
    assert set(found) <= set(lines[guilty])
    assert len(found) <= {"replicated": mesh.dp, "zero": 1, "twins": 2}[kind]
    assert differed_in_place(mesh, traces[0], traces[0], hidden, 0.0) == ()


@given(MESHES.filter(lambda mesh: mesh.dp > 1), st.sampled_from([math.nan, math.inf, 1e6]), st.booleans(), st.data())
def test_who_is_wrong_again_is_told_by_whose_numbers_are_bad(mesh, bad, always, data):
    replica = data.draw(st.integers(0, mesh.dp - 1))
    inside = data.draw(st.sets(st.integers(0, mesh.unit - 1), min_size=1))
    guilty = tuple(sorted(replica * mesh.unit + i for i in inside))
    own = [reading((rank // mesh.unit, rank % mesh.unit)) for rank in range(mesh.size)]
    moved = [reading(((rank // mesh.unit + 1) % mesh.dp, rank % mesh.unit)) for rank in range(mesh.size)]
    assert compare_elsewhere(mesh, own, moved, 0.0) == Elsewhere((), None)
    for rank in guilty:
        own[rank] = reading("spoilt", bad)
        moved[rank] = reading("spoilt too", bad) if always else moved[rank]
    assert compare_elsewhere(mesh, own, moved, 0.0) == Elsewhere(guilty, replica)


def test_two_bad_numbers_that_differ_tell_nothing():
    mesh = Mesh(dp=2)
    own, moved = [reading("a", math.nan), reading("b")], [reading("b"), reading("c", math.nan)]
    assert compare_elsewhere(mesh, own, moved, 0.0) == Elsewhere((0, 1), None, sure=False)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([0.0, 1e-3]))
def test_with_a_tolerance_norms_are_compared_and_bad_is_like_bad(norm, loss, tolerance):
    one = reading("one", norm, loss)
    assert one.like(reading("one", norm, loss), tolerance)
    assert one.like(reading("two", norm * 1.0001, loss), tolerance) == bool(tolerance)
    assert not one.like(reading("two", norm * 1.01, loss), tolerance)
    assert not one.like(reading("two", math.nan, loss), tolerance)
    assert reading("one", math.nan).like(reading("two", norm, math.inf), tolerance) == bool(tolerance)


def test_a_micro_batch_travels_whole():
    batch = global_batch("untied", 1)
    batch = MicroBatch(**{**vars(batch), "fields_BS": {"advantages": batch.loss_mask_BS * 2}})
    there = _batch(_tensors(batch))
    assert there.parent_ids_BS is None
    tensors: list[list[torch.Tensor]] = [[], []]
    for one, found in zip((batch, there), tensors, strict=True):
        one.map(lambda tensor, found=found: found.append(tensor))
    assert all(map(torch.equal, *tensors))


# Whole steps

DATA_STEP, STEPS = 1, 3


class Poisonous(NextToken):
    """A loss that is not finite where a certain sample is in the micro-batch, wherever that is run."""

    def __init__(self, tokens_S: torch.Tensor) -> None:
        super().__init__()
        self._tokens_S = tokens_S

    def __call__(self, logits_TVt, batch, start, tp):
        loss, sums = super().__call__(logits_TVt, batch, start, tp)
        poisoned = any(torch.equal(tokens, self._tokens_S) for tokens in batch.tokens_BS)
        return loss * (torch.nan if poisoned else 1.0), sums


def break_gradient(engine: TrainEngine, times: float, factor: float) -> Callable[[], None]:
    """From now on, so many times, a gradient of this rank comes out wrong."""
    left = [times]

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        return grad * factor if left[0] >= 0 else grad

    names = {part.name: slot.param for slot in engine.model.trained for part in slot.param.parts}
    late = engine.config.parallel.schedule == "zero-bubble"  # whose matrices have no gradient yet when hooks run
    chosen = "input_layernorm.weight" if late else "mlp.down_proj.weight"
    param = next(param for name, param in names.items() if name.endswith(chosen))
    return param.register_hook(spoil).remove


def run_steps(world: World, chosen, fault: str, guilty: int | None = None):
    """Results as text, the bits of weights and optimizer, and the verdict on the step that was hurt."""
    arch = "tied" if chosen.parallel.virtual_stages > 1 else "untied"  # with a layer for each chunk
    engine = make(arch, world, chosen)
    results = []
    for step in range(STEPS):
        undo: Callable[[], object] = int
        if step == DATA_STEP:
            if "norm" in fault:  # what is usual is known by now, or believed to be so
                engine.record = engine.record | {"updates": 20, "norm_mean": 1e-6 if fault == "data norm" else 1.0}
            if fault == "data":
                engine.objective = Poisonous(global_batch("untied", step).tokens_BS[5])
            elif world.rank == guilty:
                factor = 1e6 if "norm" in fault else torch.nan
                undo = break_gradient(engine, 1 if "moment" in fault else math.inf, factor)
        results.append(engine.step(batches(engine, arch, step)))
        undo()
        engine.objective = NextToken()
    told = [(r.step, repr(r.loss), repr(r.grad_norm), r.skipped) for r in results]
    held = [bits(t) for t in (engine.model.weights, *engine.optimizer.values())]
    verdicts = [r.verdict for r in results]
    assert verdicts[0] is None
    assert verdicts[2] is None
    return told, held, engine.record, verdicts[DATA_STEP]


def guarded(mesh: Mesh, precision: str = "fp32", norm: bool = False, recheck: bool = True, **parallel):
    guard = GuardConfig(recheck=recheck, suspect_factor=100.0 if norm and recheck else None)
    return config(precision, parallel={"pp": mesh.pp, "tp": mesh.tp, **parallel}, guard=guard)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


HARDWARE = [
    # mesh, further, fault, guilty, blamed
    (Mesh(dp=2), {}, "moment", 1, (1,)),
    (Mesh(dp=3), {"precision": "bf16"}, "lasting", 2, (2,)),  # micro-batches that three do not divide
    slow(Mesh(dp=2, tp=2), {}, "lasting", 1, (1,)),
    slow(Mesh(dp=2, pp=2), {}, "moment", 0, (0,)),
    (Mesh(dp=2), {"norm": True}, "lasting norm", 0, (0,)),
    slow(Mesh(), {}, "moment", 0, (0,)),
    slow(Mesh(pp=2, tp=2), {}, "moment", 3, (3,)),
    slow(Mesh(dp=2), {"zero": False}, "moment", 1, (0, 1)),
    slow(Mesh(dp=2), {"twins": True}, "moment", 1, (0, 1)),
    slow(Mesh(dp=4), {"twins": True, "precision": "bf16"}, "moment", 3, (3,)),
    slow(Mesh(dp=4), {"twins": True}, "lasting", 0, (0,)),
    slow(Mesh(dp=2), {"zero": False}, "lasting", 1, (1,)),
    slow(Mesh(dp=2, pp=2), {"schedule": "zero-bubble"}, "lasting", 0, (0,)),
    slow(Mesh(dp=2, pp=2), {"virtual_stages": 2, "schedule": "interleaved-1f1b"}, "lasting", 2, (2,)),
    slow(Mesh(dp=2, tp=2), {"sequence_parallel": True, "norm": True}, "moment norm", 3, (3,)),
]


@pytest.mark.parametrize(("mesh", "further", "fault", "guilty", "blamed"), HARDWARE)
def test_a_step_hurt_by_hardware_is_that_of_the_quiet_run_to_the_bit(ranks, mesh, further, fault, guilty, blamed):
    chosen = guarded(mesh, **further)
    hurt = ranks.run(run_steps, mesh, chosen, fault, guilty)
    quiet = ranks.run(run_steps, mesh, chosen, "quiet norm" if "norm" in fault else "quiet")
    for mine, wanted in zip(hurt, quiet, strict=True):
        assert mine[:3] == wanted[:3]
    verdicts: list[Verdict] = [verdict for *_, verdict in hurt]
    assert len({str(verdict) for verdict in verdicts}) == 1
    assert len({tuple(verdict.digests) for verdict in verdicts}) == 1
    found = verdicts[0]
    assert (found.kind, found.ranks, found.mended) == ("hardware", blamed, True)
    assert found.what == ("suspicious norm" if "norm" in fault else "non-finite")
    assert found.lasting == ("lasting" in fault)
    assert found.sure == (len(blamed) == 1)
    assert len(found.hosts) == len(blamed)
    assert all(wrong != right for wrong, right in found.digests.values())
    assert {verdict for *_, verdict in quiet} == {None}


DATA = [
    slow(Mesh(), {}),
    (Mesh(dp=3), {}),
    slow(Mesh(dp=2, tp=2), {"precision": "bf16"}),
    slow(Mesh(dp=2, pp=2), {}),
    slow(Mesh(dp=2), {"zero": False}),
]


@pytest.mark.parametrize(("mesh", "further"), DATA)
def test_what_is_bad_everywhere_is_the_datas_and_the_step_is_skipped_as_ever(ranks, mesh, further):
    asked = ranks.run(run_steps, mesh, guarded(mesh, **further), "data")
    usual = ranks.run(run_steps, mesh, guarded(mesh, recheck=False, **further), "data")
    for mine, wanted in zip(asked, usual, strict=True):
        assert mine[:3] == wanted[:3]
        assert [skipped for *_, skipped in mine[0]] == [None, "non-finite", None]
        assert mine[3] == Verdict("data", "non-finite", compared=mesh.dp > 1)
        assert wanted[3] is None


def test_a_norm_that_is_the_datas_is_applied(ranks):
    mesh = Mesh(dp=2)
    asked = ranks.run(run_steps, mesh, guarded(mesh, norm=True), "data norm")
    usual = ranks.run(run_steps, mesh, guarded(mesh, recheck=False), "data norm")
    assert [mine[:3] for mine in asked] == [wanted[:3] for wanted in usual]
    assert {str(mine[3]) for mine in asked} == {str(Verdict("data", "suspicious norm"))}


def run_spoilt_weight(world: World):
    """A weight goes bad where it lies; nobody compares weights, but the loss is bad."""
    engine = make("untied", world, guarded(world.mesh))
    engine.step(batches(engine, "untied", 0))
    if world.rank == 1:
        engine.model.trained[3].param.data.view(-1)[5] = torch.inf
    try:
        result = engine.step(batches(engine, "untied", 1))
    except ReplicasDisagree as error:
        return str(error), None
    return result.verdict, (repr(result.loss), bits(engine.model.weights))


def test_weights_that_went_bad_are_brought_from_where_they_are_good(ranks):
    quiet = ranks.run(run_steps, Mesh(dp=3), guarded(Mesh(dp=3)), "quiet")
    for (verdict, held), (told, *_) in zip(ranks.run(run_spoilt_weight, Mesh(dp=3)), quiet, strict=True):
        assert (verdict.kind, verdict.what, verdict.ranks) == ("hardware", "replicas differ", (1,))
        assert held[0] == told[1][1]
    for error, _ in ranks.run(run_spoilt_weight, Mesh(dp=2)):
        assert "differ between rank 0" in error
        assert "no majority says who is right" in error


@apart
def test_whoever_is_lost_while_a_step_is_run_again_leaves_one_that_nobody_voted_on():
    chosen = config(parallel={"twins": True})
    quiet = make("untied", chosen=config())
    wanted = [quiet.step(batches(quiet, "untied", step)).loss for step in range(2)]
    crew = Crew(Mesh(dp=4), chosen, ARCHS["untied"])
    break_gradient(crew.ranks[1].engine, 1, torch.nan)
    victim = crew.ranks[2].engine
    first, real = [True], victim.accumulate

    def vanish_the_second_time(*given, **how):
        if not first:
            raise Dropped
        first.pop()
        return real(*given, **how)

    victim.accumulate = vanish_the_second_time
    outcomes = crew.run(step_of)
    assert isinstance(outcomes[2], Dropped)
    lost = [crew.seating.places[2]]
    assert crew.conclude(lost) == Redo(0)
    crew.move(seat(chosen, crew.arch, crew.seating, frozenset(lost), Mesh(dp=3)), lost)
    results = [all_of(crew.run(step_of))[0] for _ in range(2)]
    assert [result.loss for result in results] == pytest.approx(wanted, rel=1e-9)
    assert {result.verdict for result in results} == {None}
    crew.leave()


def step_of(task: Task):
    """Train the step that a task is at."""
    return task.engine.step(batches(task.engine, "untied", task.engine.counters.step))


def test_a_verdict_is_told_in_words():
    hardware = Verdict("hardware", "non-finite", (3,), (("node-a", 7),), mended=True)
    assert str(hardware) == "non-finite by hardware of rank 3 (node-a, pid 7): not when run again"
    unsure = Verdict("hardware", "spike", (0, 1), (("a", 7), ("b", 8)), sure=False, lasting=True)
    assert "rank 0 (a, pid 7) or 1 (b, pid 8): wrong again" in str(unsure)
    assert "the same when run again here and on another replica" in str(Verdict("data", "non-finite"))
