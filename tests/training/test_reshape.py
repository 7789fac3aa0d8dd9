"""A step in which ranks vanish is the step of the quiet run, whenever they do: finished or done again by the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from raytron.config import GuardConfig, LoRAConfig, TrainConfig
from raytron.parallel.layout import CoverageError
from raytron.parallel.mesh import Mesh
from raytron.training import StepResult
from raytron.training.commit import Finish, Redo
from raytron.training.reshape import SOURCES, Change
from raytron.training.seating import Seating, at_risk, config_at, seat
from raytron.training.twins import twins_that_differ
from tests.training.crews import POINTS, Crew, Task, all_of, apart, together
from tests.training.engines import ARCHS, batches, bits, canonical, config, make

BEFORE, AFTER = 2, 2  # steps before the one that is struck, and after it
AFTER_VOTE = ("voted", "update", "gather", "published")


@cache
def quiet(arch: str, steps: int, micro: int = 2) -> list[StepResult]:
    """The steps of one process that nothing happens to."""
    engine = make(arch, chosen=config(micro=micro))
    return [engine.step(batches(engine, arch, step)) for step in range(steps)]


def step_of(arch: str) -> Callable[[Task], StepResult]:
    """Train the step that a task is at."""
    return lambda task: task.engine.step(batches(task.engine, arch, task.engine.counters.step))


def chosen_for(mesh: Mesh, **parallel) -> TrainConfig:
    return config(parallel={"pp": mesh.pp, "tp": mesh.tp, **parallel})


def assert_quiet(results: list[StepResult], arch: str) -> None:
    for result in results:
        wanted = quiet(arch, BEFORE + 1 + AFTER)[result.step - 1]
        assert (result.loss, result.grad_norm) == pytest.approx((wanted.loss, wanted.grad_norm), rel=1e-9)
        assert (result.tokens, result.skipped) == (wanted.tokens, None)


def go_on(crew: Crew, arch: str) -> None:
    """To the end, every step as in the quiet run."""
    for task in crew.ranks:
        assert_quiet(task.finished, arch)
    while crew.ranks[0].engine.counters.step < BEFORE + 1 + AFTER:
        assert_quiet(all_of(crew.run(step_of(arch))), arch)
    records = [task.engine.record for task in crew.ranks]
    assert all(record == records[0] for record in records)
    assert records[0]["consumed_samples"] == 8 * (BEFORE + 1 + AFTER)
    assert {name for task in crew.run(lambda task: twins_that_differ(task.engine)) for name in task} == set()


TWINS, REPLICATED = {"twins": True}, {"zero": False}
RECOVERIES = {
    # model, how it was cut, who vanished, how it is cut then, newcomers
    "replace": ("untied", Mesh(dp=4), TWINS, 1, Mesh(dp=4), 1),
    "uneven": ("tied", Mesh(dp=4), TWINS, 2, Mesh(dp=3), 0),
    "drop-unit": ("untied", Mesh(dp=2, tp=2), TWINS, 3, Mesh(tp=2), 0),
    "tied-ends": ("tied", Mesh(dp=2, pp=2), TWINS, 0, Mesh(dp=2, pp=2), 1),
    "reshape": ("untied", Mesh(dp=2, pp=2), REPLICATED, 1, Mesh(dp=3), 0),
    "other-way": ("tied", Mesh(dp=2, tp=2), TWINS, 0, Mesh(pp=2), 0),
    "virtual": ("tied", Mesh(dp=2, pp=2), {"twins": True, "virtual_stages": 2}, 2, Mesh(dp=2, tp=2), 1),
}
QUICK = {("replace", "gather"), ("uneven", "backward"), ("drop-unit", "voted"), ("tied-ends", "published")}
STRIKES = [
    pytest.param(name, point, marks=[] if (name, point) in QUICK else pytest.mark.slow, id=f"{name}-{point}")
    for name in RECOVERIES
    for point in POINTS
]


@pytest.mark.parametrize(("name", "point"), STRIKES)
@apart
def test_a_step_in_which_a_rank_vanishes_is_lost_to_nobody(name, point):
    arch, mesh, parallel, victim, target, newcomers = RECOVERIES[name]
    crew = Crew(mesh, chosen_for(mesh, **parallel), ARCHS[arch])
    for _ in range(BEFORE):
        all_of(crew.run(step_of(arch)))
    crew.strike(step_of(arch), victim, point)
    lost = [crew.seating.places[victim]]
    spare = [crew.name() for _ in range(newcomers)]
    new = seat(crew.config, crew.arch, crew.seating, frozenset(lost), target, spare)
    crew.move(new, lost)
    assert {task.engine.counters.step for task in crew.ranks} == {BEFORE + (point in AFTER_VOTE)}
    go_on(crew, arch)
    crew.leave()


@pytest.mark.parametrize("deaf", [(0,), (0, 2, 3)], ids=["one-is-deaf", "nobody-heard"])
@apart
def test_who_never_heard_the_vote_takes_it_from_who_did(deaf):
    """If only the rank that vanished had passed it, nobody knows of it, and the batch is done again."""
    crew = Crew(Mesh(dp=4), chosen_for(Mesh(), twins=True), ARCHS["untied"])
    crew.strike(step_of("untied"), 1, "gather", deaf)
    lost = [crew.seating.places[1]]
    resolution = crew.conclude(lost)
    assert isinstance(resolution, Redo if len(deaf) == 3 else Finish)
    crew.move(seat(crew.config, crew.arch, crew.seating, frozenset(lost), Mesh(dp=3)), lost)
    assert crew.ranks[0].engine.counters.step == (len(deaf) < 3)
    go_on(crew, "untied")
    crew.leave()


def state(crew: Crew) -> list[dict]:
    """The bits of every rank: weights and optimizer."""
    found = []
    for task in crew.ranks:
        engine = task.engine
        held = {key: bits(values) for key, values in canonical(engine).items()}
        found.append(held | {name: bits(flat) for name, flat in engine.optimizer.items()})
    return found


def addresses(crew: Crew, places: list[str]) -> list[int]:
    """Where in memory the optimizer's buffers are."""
    return [flat.data_ptr() for place in places for flat in crew.tasks[place].engine.optimizer.values()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@apart
def test_on_the_same_mesh_the_run_goes_on_to_the_bit(precision):
    mesh, arch = Mesh(dp=2, tp=2), "tied"
    chosen = config(precision, parallel={"tp": 2, "twins": True})
    calm, struck = (Crew(mesh, chosen, ARCHS[arch]) for _ in range(2))
    for _ in range(4):
        all_of(calm.run(step_of(arch)))
    all_of(struck.run(step_of(arch)))
    for victim, point in ((3, "update"), (0, "reduce")):
        struck.strike(step_of(arch), victim, point)
        lost = [struck.seating.places[victim]]
        old = struck.seating
        new = seat(chosen, ARCHS[arch], old, frozenset(lost), mesh, [struck.name()])
        stay = [i for i in range(4) if i != victim]
        assert [new.places[i] for i in stay] == [old.places[i] for i in stay]
        kept = addresses(struck, [old.places[i] for i in stay])
        struck.move(new, lost)
        assert addresses(struck, [old.places[i] for i in stay]) == kept  # not even copied
    while struck.ranks[0].engine.counters.step < 4:
        all_of(struck.run(step_of(arch)))
    assert state(struck) == state(calm)
    for crew in (calm, struck):
        crew.leave()


@apart
def test_a_run_takes_any_shape_between_steps():
    """Growing, draining, other tp and pp, down to one rank; who leaves gives what it has first."""
    arch, first = "tied", Mesh(dp=2)
    crew = Crew(first, chosen_for(first, twins=True), ARCHS[arch])
    shapes = [Mesh(dp=3), Mesh(dp=2, tp=2), Mesh(pp=4), Mesh(dp=1)]
    for step, mesh in enumerate((first, *shapes)):
        if step:
            spare = [crew.name() for _ in range(mesh.size)]
            moved = crew.move(seat(crew.config, crew.arch, crew.seating, frozenset(), mesh, spare))
            assert len({(m.bytes_moved, m.bytes_local) for m in moved}) == 1
            came = [(kind, count) for m in moved for kind, _, count in m.sources]
            assert sum(count for kind, count in came if kind == "own") == moved[0].bytes_local
            assert sum(count for kind, count in came if kind != "own") == moved[0].bytes_moved
            assert {kind for kind, _ in came} <= SOURCES.keys()
            assert crew.seating.mesh == mesh
        assert_quiet(all_of(crew.run(step_of(arch))), arch)
    crew.leave()


@pytest.mark.parametrize("parallel", [{"twins": True}, {}], ids=["both-twins", "no-twins"])
@apart
def test_too_great_a_loss_is_said_on_every_rank_and_changes_nothing(parallel):
    crew = Crew(Mesh(dp=4), chosen_for(Mesh(), **parallel), ARCHS["untied"])
    crew.strike(step_of("untied"), 1, "gather")
    lost = [crew.seating.places[i] for i in ((1, 3) if parallel else (1,))]
    places = [place for place in crew.seating.places if place not in lost]
    with pytest.raises(CoverageError, match="no source holds"):
        crew.move(Seating(Mesh(dp=len(places)), tuple(places)), lost)
    assert all(crew.tasks[place]._next is None for place in places)
    assert all(crew.tasks[place].engine.counters.step == 1 for place in places)


@pytest.mark.parametrize("point", ["vote", "gather"])
@apart
def test_a_second_loss_during_the_move_is_met_from_the_same_sources(point):
    arch = "untied"
    crew = Crew(Mesh(dp=4), chosen_for(Mesh(), twins=True), ARCHS[arch])
    for _ in range(BEFORE):
        all_of(crew.run(step_of(arch)))
    crew.strike(step_of(arch), 1, point)
    first, second = crew.seating.places[1], crew.seating.places[2]  # not each other's twins
    crew.move(seat(crew.config, crew.arch, crew.seating, frozenset([first]), Mesh(dp=3)), [first], spoil=second)
    lost = [first, second]
    crew.move(seat(crew.config, crew.arch, crew.seating, frozenset(lost), Mesh(dp=2)), lost)
    go_on(crew, arch)
    crew.leave()


@apart
def test_who_died_before_all_had_adopted_is_a_loss_after_the_move():
    """The director has decided: who has not adopted yet does so by the next move."""
    arch = "untied"
    crew = Crew(Mesh(dp=3), chosen_for(Mesh(), twins=True), ARCHS[arch])
    for _ in range(BEFORE):
        all_of(crew.run(step_of(arch)))
    crew.strike(step_of(arch), 0, "gather")
    first, spare = crew.seating.places[0], crew.name()
    new = seat(crew.config, crew.arch, crew.seating, frozenset([first]), Mesh(dp=3), [spare])
    crew.move(new, [first], adopt=crew.seating.places[1:2])
    lost = [crew.seating.places[1]]
    crew.move(seat(crew.config, crew.arch, crew.seating, frozenset(lost), Mesh(dp=2)), lost)
    assert spare in crew.seating.places
    go_on(crew, arch)
    crew.leave()


@apart
def test_ranks_of_different_versions_never_mix():
    crew = Crew(Mesh(dp=2), chosen_for(Mesh(), zero=False), ARCHS["untied"])
    ahead = crew.ranks[1].engine
    ahead.record = ahead.record | {"step": 1}
    worlds = crew.meet(Mesh(dp=2))
    change = Change(crew.seating, crew.seating)
    parts = [
        lambda r=r, place=place: crew.tasks[place].reshape(worlds[r], worlds[r], place, change)
        for r, place in enumerate(crew.seating.places)
    ]
    for outcome in together(parts):
        assert isinstance(outcome, ValueError)
        assert "of different versions, conclude before reshaping" in str(outcome)
    crew.leave()
    for world in worlds:
        world.close()


@apart
def test_weights_that_were_not_gathered_are_not_trained_on():
    crew = Crew(Mesh(dp=2), chosen_for(Mesh(), twins=True), ARCHS["untied"])
    crew.strike(step_of("untied"), 1, "gather")
    crew.conclude([crew.seating.places[1]])
    with pytest.raises(AssertionError, match="two versions: the task has to be reshaped first"):
        step_of("untied")(crew.ranks[0])


@apart
def test_adapters_move_with_what_they_are_beside():
    arch, mesh = ARCHS["untied"].replace(lora=LoRAConfig(rank=3, alpha=6)), Mesh(dp=2, tp=2)
    calm, struck = Crew(Mesh(), chosen_for(Mesh()), arch), Crew(mesh, chosen_for(mesh, twins=True), arch)
    wanted = [all_of(calm.run(step_of("untied")))[0].loss for _ in range(4)]
    all_of(struck.run(step_of("untied")))
    struck.strike(step_of("untied"), 1, "update")
    lost = [struck.seating.places[1]]
    struck.move(seat(struck.config, arch, struck.seating, frozenset(lost), Mesh(dp=3)), lost)
    found = [struck.ranks[0].finished[0].loss, *(all_of(struck.run(step_of("untied")))[2].loss for _ in range(2))]
    assert found == pytest.approx(wanted[1:], rel=1e-9)
    for crew in (calm, struck):
        crew.leave()


@apart
def test_a_step_that_was_to_be_skipped_is_skipped_once():
    """Its vote is passed, and the one that looks for what went bad first vanishes."""
    chosen = config(parallel={"twins": True}, guard=GuardConfig(recheck=False))
    calm, struck = (Crew(Mesh(dp=2), chosen, ARCHS["untied"]) for _ in range(2))
    for crew in (calm, struck):
        all_of(crew.run(step_of("untied")))
        hooks = [t.engine.model.trained[0].param.register_hook(lambda grad: grad * torch.nan) for t in crew.ranks]
        if crew is calm:
            assert {result.skipped for result in all_of(crew.run(step_of("untied")))} == {"non-finite"}
        else:
            crew.strike(step_of("untied"), 1, "voted")
        for hook in hooks:
            hook.remove()
    lost, spare = [struck.seating.places[1]], struck.name()
    assert struck.conclude(lost).whole
    assert [result.skipped for result in struck.ranks[0].finished] == ["non-finite"]
    struck.move(seat(struck.config, struck.arch, struck.seating, frozenset(lost), Mesh(dp=2), [spare]), lost)
    for crew in (calm, struck):
        all_of(crew.run(step_of("untied")))
    assert [task.engine.record for task in struck.ranks] == [task.engine.record for task in calm.ranks]
    assert struck.ranks[0].engine.counters.nan_steps == 1
    assert state(struck) == state(calm)
    for crew in (calm, struck):
        crew.leave()


# Pure functions


def test_seats_keep_what_places_hold():
    chosen, arch = chosen_for(Mesh(), twins=True), ARCHS["untied"]
    old = Seating(Mesh(dp=4), ("a", "b", "c", "d"))
    assert seat(chosen, arch, old, frozenset("b"), Mesh(dp=4), ["new"]).places == ("a", "new", "c", "d")
    assert set(seat(chosen, arch, old, frozenset("b"), Mesh(dp=3)).places) == {"a", "c", "d"}
    assert seat(chosen, arch, old, frozenset(), Mesh(dp=4)).places == old.places
    with pytest.raises(ValueError, match="1 seats more than there are places"):
        seat(chosen, arch, old, frozenset("b"), Mesh(dp=4))


def test_what_a_node_would_take_with_it():
    arch, nodes = ARCHS["untied"], {"a": "x", "b": "x", "c": "y", "d": "y"}
    seating = Seating(Mesh(dp=4), tuple(nodes))
    assert at_risk(chosen_for(Mesh(), twins=True), arch, seating, nodes.__getitem__) == {}
    assert at_risk(chosen_for(Mesh(), zero=False), arch, seating, nodes.__getitem__) == {}
    alone = at_risk(chosen_for(Mesh()), arch, seating, nodes.__getitem__)
    assert alone.keys() == {"x", "y"}
    elements = make().model.num_parameters()
    assert sum(alone.values()) == elements * 8 * 2  # both moments in float64; weights are everywhere
    one = at_risk(chosen_for(Mesh(tp=4)), arch, Seating(Mesh(tp=4), tuple(nodes)), lambda place: "x")
    assert one == {"x": elements * 8 * 3}


def test_a_seating_names_a_place_for_every_rank():
    with pytest.raises(ValueError, match="needs 2 different places"):
        Seating(Mesh(dp=2), ("a", "a"))


def test_stages_that_were_given_are_kept_only_where_they_fit():
    chosen = config(parallel={"pp": 2, "layers_per_stage": (1, 2)})
    assert config_at(chosen, Mesh(dp=2, pp=2)) is chosen
    assert config_at(chosen, Mesh(pp=2, tp=2)).parallel.layers_per_stage == (1, 2)
    other = config_at(chosen, Mesh(dp=4))
    assert (other.parallel.pp, other.parallel.layers_per_stage) == (1, None)
    assert other.global_batch_size == chosen.global_batch_size
