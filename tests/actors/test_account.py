"""What a run's steps were worth is never more than the time there was, and nothing that has to be done again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.actors.account import Account

SECONDS = st.floats(0, 1e4)
DEEDS = st.one_of(
    st.tuples(st.just("begins"), SECONDS),
    st.tuples(st.just("step"), SECONDS, SECONDS),
    st.tuples(st.just("regained"), SECONDS, st.lists(SECONDS, max_size=3)),
    st.tuples(st.just("back"), SECONDS, st.integers(0, 20)),
)


@given(st.lists(DEEDS, max_size=40))
def test_useful_time_is_within_wall_time_whatever_is_said(deeds):
    now, step = 0.0, 0
    account = Account(now)
    for kind, passed, *rest in deeds:
        now += passed
        before = account.useful_s
        if kind == "begins":
            account.begins(now)
        elif kind == "step":
            step += 1
            counted = account.step(step, rest[0], now)
            assert 0 <= counted <= rest[0]
        elif kind == "regained":
            numbers = range(step + 1, step + 1 + len(rest[0]))
            step += len(rest[0])
            counted = account.regained(zip(numbers, rest[0], strict=True), now)
            assert account.useful_s == pytest.approx(before + counted)
        else:
            step = min(step, rest[0])
            lost = account.back_to(step)
            assert account.useful_s == pytest.approx(before - lost, abs=1e-6)
        assert -1e-6 <= account.useful_s <= now + 1e-6 * (1 + now)
        assert 0 <= account.unheard_s(now) <= now
        assert account.step_s >= 0


def test_steps_that_are_done_again_count_once():
    account = Account(0.0)
    for step in range(1, 11):
        account.step(step, 1.0, float(step))
    assert account.useful_s == 10.0
    assert account.back_to(7) == 3.0
    assert account.back_to(7) == 0.0
    account.begins(10.0)
    for step in range(8, 11):
        account.step(step, 1.0, float(step) + 3)
    assert account.useful_s == 10.0


def test_the_first_step_of_a_group_does_not_count_its_load():
    account = Account(0.0)
    account.begins(100.0)  # the ranks were there long before, and measured since then
    assert account.step(1, 50.0, 101.0) == 1.0


def test_a_step_finished_after_a_fault_counts_as_a_usual_one():
    account = Account(0.0)
    for step in range(1, 6):
        account.step(step, 1.0, float(step))
    assert account.regained([(6, 20.0)], 30.0) == 1.0  # its rank's clock ran until the fault was noticed
    assert account.unheard_s(31.0) == 1.0
