"""Health of engines and the choice among them, without Ray: for any sequence of events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytron.actors.fleet import Balancer, Fleet, Health, Progress
from raytron.inference import Stats

SIZE = 3


class Lives(RuleBasedStateMachine):
    """Engines start, are updated, die, leave and join in any order; pushes come in between."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet, self.pushed = Fleet(SIZE, max_failures=4, most=SIZE + 1), 0

    def some(self, data, *healths: Health) -> int | None:
        engines = self.fleet.of(*healths)
        return data.draw(st.sampled_from(engines)) if engines else None

    @rule(data=st.data(), version=st.none() | st.just(0))
    def start(self, data, version) -> None:
        if (engine := self.some(data, Health.STARTING)) is not None:
            self.fleet.started(engine, version)

    @rule()
    def push(self) -> None:
        self.pushed += 1
        self.fleet.published(self.pushed)

    @rule(data=st.data(), behind=st.integers(0, 2))
    def update(self, data, behind) -> None:
        if (engine := self.some(data, Health.STALE, Health.READY)) is not None and self.pushed >= 1:
            was, version = self.fleet.states[engine].health, max(self.pushed - behind, 0)
            self.fleet.updated(engine, version)
            if was is Health.STALE:
                assert (engine in self.fleet.ready) == (version == self.fleet.current)

    @rule(data=st.data())
    def lose_the_trainer(self, data) -> None:
        if (engine := self.some(data, Health.STALE, Health.READY)) is not None:
            self.fleet.mixed(engine)
            assert engine not in self.fleet.ready

    @rule(data=st.data())
    @precondition(lambda self: not self.fleet.hopeless)
    def die(self, data) -> None:
        if (engine := self.some(data, Health.STARTING, Health.STALE, Health.READY)) is not None:
            again = self.fleet.failed(engine, "killed")
            assert again == (self.fleet.failures <= 4)
            assert self.fleet.states[engine].version is None
            assert self.fleet.states[engine].reason == "killed"
            assert engine not in self.fleet.ready

    @rule(data=st.data())
    def leave(self, data) -> None:
        if (engine := self.some(data, Health.STALE, Health.READY)) is not None:
            self.fleet.leaving(engine)
            assert engine not in self.fleet.ready + self.fleet.present

    @rule(data=st.data())
    def have_left(self, data) -> None:
        if (engine := self.some(data, Health.STARTING, Health.LEAVING)) is not None:
            self.fleet.left(engine, "not wanted")

    @rule()
    @precondition(lambda self: len(self.fleet.present) + len(self.fleet.of(Health.LOST)) <= SIZE)
    def join(self) -> None:
        assert self.fleet.states[self.fleet.joining()].health is Health.STARTING

    @invariant()
    def those_that_left_are_replaced_and_those_that_are_lost_are_not(self) -> None:
        lost = len(self.fleet.of(Health.LOST))
        assert self.fleet.hopeless == (lost > SIZE and not self.fleet.present)

    @invariant()
    def only_engines_that_had_weights_answer(self) -> None:
        assert all(self.fleet.states[engine].version is not None for engine in self.fleet.ready)


TestLives = Lives.TestCase


def test_a_restarted_engine_is_stale_until_it_has_the_current_weights():
    fleet = Fleet(2, max_failures=1, current=0)
    for engine in (0, 1):
        fleet.started(engine, 0)
    assert fleet.ready == (0, 1)
    fleet.published(1)
    for engine in (0, 1):
        fleet.updated(engine, 1)
    assert fleet.failed(0, "killed")
    fleet.started(0, 0)  # what its directory holds
    assert fleet.ready == (1,)
    fleet.updated(0, 0)
    assert fleet.ready == (1,)
    fleet.updated(0, 1)
    assert fleet.ready == (0, 1)
    assert not fleet.failed(1, "killed")
    assert not fleet.hopeless
    assert not fleet.failed(0, "killed")
    assert fleet.hopeless


def test_what_cannot_happen_is_refused():
    fleet = Fleet(1)
    with pytest.raises(AssertionError, match="cannot go from starting to ready"):
        fleet._move(0, Health.READY)
    with pytest.raises(AssertionError, match="starting was updated"):
        fleet.updated(0, 1)


REQUESTS = st.lists(st.tuples(st.integers(1, 100), st.none() | st.integers(0, 5)), max_size=60)


@given(REQUESTS, st.integers(1, 4))
def test_load_stays_even(requests, engines: int):
    """No engine is ever ahead of the freest by more than a group may be, and all that is outstanding is counted."""
    balancer = Balancer(engines, slack=8)
    sent = []
    for cost, group in requests:
        engine = balancer.choose(cost, range(engines), group)
        sent.append((engine, cost))
        others = [n for e, n in enumerate(balancer.outstanding) if e != engine]
        assert balancer.outstanding[engine] - min(others, default=balancer.outstanding[engine]) <= 9 * cost
    assert sum(balancer.outstanding) == sum(cost for cost, _ in requests)
    for engine, cost in sent:
        balancer.done(engine, cost)
    assert balancer.outstanding == [0] * engines


def test_a_group_stays_together_while_there_is_room():
    balancer = Balancer(2)
    homes = {group: {balancer.choose(10, (0, 1), group) for _ in range(8)} for group in range(4)}
    assert all(len(engines) == 1 for engines in homes.values())
    assert balancer.outstanding == [160, 160]


def test_a_group_does_not_queue_up_behind_itself():
    balancer = Balancer(2)
    engines = [balancer.choose(10, (0, 1), "one") for _ in range(32)]
    assert engines.count(0) >= 8
    assert engines.count(1) >= 8


def test_an_engine_that_failed_a_request_is_avoided_while_there_is_another():
    balancer = Balancer(2)
    assert balancer.choose(10, (0, 1), "a") == 0
    assert balancer.choose(10, (0, 1), "a", avoid={0}) == 1
    assert balancer.choose(10, (0,), "a", avoid={0}) == 0


def test_an_engine_with_work_is_stuck_for_as_long_as_nothing_of_it_changes():
    progress, work = Progress(), Stats(running=2, waiting=1, generated_tokens=5)
    said = [
        (work, 0.0),
        (work, 7.0),
        (replace(work, kv_usage=0.1), 0.0),  # a chunk of a long prompt
        (replace(work, kv_usage=0.1), 7.0),
        (replace(work, kv_usage=0.1, paused=True), 0.0),
        (replace(work, kv_usage=0.1, paused=True), 0.0),
        (replace(work, kv_usage=0.1), 0.0),
        (Stats(finished=3), 0.0),  # nothing to do, for as long as it likes
        (Stats(finished=3), 0.0),
        (Stats(finished=3, waiting=1), 0.0),
        (Stats(finished=3, waiting=1), 7.0),
        (Stats(finished=3, waiting=1), 14.0),
    ]
    assert [progress.stuck_s(stats, 100.0 + 7.0 * at) for at, (stats, _) in enumerate(said)] == [s for _, s in said]
