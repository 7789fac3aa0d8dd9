"""Every state of a step in which ranks can die: what the others do, and that it never leaves two versions."""

from __future__ import annotations

import itertools

import pytest

from raytron.parallel.mesh import Mesh
from raytron.training.commit import PHASES, Finish, Redo, Standing, Vote, resolve
from raytron.training.seating import Seating, covered
from tests.training.engines import ARCHS, config

STEP = 6  # everyone has published it; 7 is under way, and the first may have begun 8
VOTE, BEFORE = Vote(1.5, 0.25, 96, None, 96.0), Vote(1.6, 0.25, 96, None, 96.0)
BETWEEN, FORWARD, REDUCED, VOTED, UPDATED, PUBLISHED, NEXT_FORWARD, NEXT_REDUCED = range(8)
STANDINGS = (
    Standing(STEP, "between", None, BEFORE),
    Standing(STEP, "forward_backward", None, BEFORE),
    Standing(STEP, "vote", None, BEFORE),
    Standing(STEP, "vote", VOTE, BEFORE),
    Standing(STEP, "gather", VOTE, BEFORE),
    Standing(STEP + 1, "between", None, VOTE),
    Standing(STEP + 1, "forward_backward", None, VOTE),
    Standing(STEP + 1, "vote", None, VOTE),
)
MESHES = [Mesh(dp=4), Mesh(dp=2, tp=2), Mesh(dp=2, pp=2), Mesh(pp=2, tp=2), Mesh(dp=3)]


def states(mesh: Mesh, zero: bool):
    """What each rank may have come to, in all combinations that can happen."""
    lines = [mesh.group("dp", rank) for rank in range(mesh.size)]
    for progress in itertools.product(range(8), repeat=mesh.size):
        if max(progress) >= VOTED and min(progress) < REDUCED:
            continue  # a vote has everyone's ballot, and a ballot comes after the reduction
        gathered = all(
            reached < PUBLISHED or min(progress[peer] for peer in line) >= UPDATED
            for reached, line in zip(progress, lines, strict=True)
        )
        reduced = all(
            reached < NEXT_REDUCED or min(progress[peer] for peer in line) >= NEXT_FORWARD
            for reached, line in zip(progress, lines, strict=True)
        )
        if reduced and (gathered or not zero):
            yield progress


def conclude(reached: int, resolution: Redo | Finish) -> int:
    """The version of a rank's shard after its part of the resolution."""
    published, shard = (STEP, STEP) if reached < PUBLISHED else (STEP + 1, STEP + 1)
    shard += reached == UPDATED
    if published == resolution.step:
        return shard
    assert isinstance(resolution, Finish)
    assert resolution.vote is VOTE
    assert reached in (REDUCED, VOTED, UPDATED)  # reduced gradients are here, or were applied
    return STEP + 1


@pytest.mark.parametrize("zero", [True, False], ids=["zero", "replicated"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"dp{mesh.dp}-pp{mesh.pp}-tp{mesh.tp}")
def test_every_state_ends_in_one_version(mesh, zero):
    sets = [dead for n in range(mesh.size) for dead in itertools.combinations(range(mesh.size), n)]
    seen, naive = set(), 0
    for progress, dead in itertools.product(states(mesh, zero), sets):
        alive = tuple(sorted(p for rank, p in enumerate(progress) if rank not in dead))
        if alive in seen:
            continue
        seen.add(alive)
        found = resolve([STANDINGS[p] for p in alive])
        passed = any(p >= VOTED for p in alive)
        assert isinstance(found, Finish if alive[0] < PUBLISHED and passed else Redo)
        assert found.step == STEP + passed  # what anybody left has heard of is not done twice
        assert {conclude(p, found) for p in alive} == {found.step}
        naive += len({STEP + (p >= UPDATED) for p in alive}) > 1
    assert naive > 0  # dropping gradients and doing the batch again would have left two versions


def test_the_order_of_ranks_does_not_matter():
    for alive in itertools.permutations((REDUCED, VOTED, UPDATED, PUBLISHED)):
        assert resolve([STANDINGS[p] for p in alive]) == Finish(STEP + 1, VOTE)


def test_a_skipped_step_leaves_all_weights_of_one_version():
    skipped = Vote(float("nan"), float("nan"), 96, "non-finite", 96.0)
    assert resolve([Standing(STEP, "vote", skipped), STANDINGS[REDUCED]]).whole
    assert not resolve([STANDINGS[VOTED], STANDINGS[REDUCED]]).whole
    assert resolve([STANDINGS[BETWEEN]]).whole
    assert not resolve([STANDINGS[BETWEEN], Standing(STEP, whole=False)]).whole


def test_what_cannot_be_resolved_is_said():
    with pytest.raises(ValueError, match="nobody is left"):
        resolve([])
    with pytest.raises(ValueError, match="its shard is torn; count it among the lost"):
        resolve([Standing(STEP, "update", VOTE), STANDINGS[VOTED]])
    assert {standing.phase for standing in STANDINGS} == set(PHASES) - {"update"}


def lost_shards(mesh: Mesh, dead: tuple[int, ...], kind: str) -> bool:
    """Whether some element of the optimizer's state has no holder left, by counting on fingers."""
    for column in {mesh.group("dp", rank) for rank in range(mesh.size)}:
        for i, rank in enumerate(column):
            owners = {
                "replicated": set(column),
                "zero": {rank},
                "twins": {rank, column[(i + len(column) // 2) % len(column)]},
            }[kind]
            if owners <= set(dead):
                return True
    return False


@pytest.mark.parametrize("kind", ["replicated", "zero", "twins"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"dp{mesh.dp}-pp{mesh.pp}-tp{mesh.tp}")
def test_what_is_left_covers_everything_unless_every_owner_died(mesh, kind):
    chosen = config(parallel={"zero": kind != "replicated", "twins": kind == "twins", "pp": mesh.pp, "tp": mesh.tp})
    arch = ARCHS["untied"].replace(num_hidden_layers=2)
    seating = Seating(mesh, tuple(f"actor-{i}" for i in range(mesh.size)))
    for n in range(mesh.size + 1):
        for dead in itertools.combinations(range(mesh.size), n):
            lost = frozenset(seating.places[rank] for rank in dead)
            assert covered(chosen, arch, seating, lost) == (not lost_shards(mesh, dead, kind)), dead
