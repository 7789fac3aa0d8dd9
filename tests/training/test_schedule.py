"""Learning rates: where they start, turn and end, and that nothing jumps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.config import OptimizerConfig, ScheduleConfig
from raytron.training import learning_rate

TOP, LOW = 1e-3, 1e-4
OPTIMIZER = OptimizerConfig(lr=TOP, min_lr=LOW)
KINDS = ("cosine", "linear", "wsd", "constant")


def rates(steps: int, **schedule) -> list[float]:
    return [learning_rate(step, steps, OPTIMIZER, ScheduleConfig(**schedule)) for step in range(steps + 1)]


@given(st.sampled_from(KINDS), st.integers(1, 80), st.integers(0, 20))
def test_it_rises_in_equal_parts_and_never_rises_again(kind, steps, warmup):
    found = rates(steps, kind=kind, warmup_steps=warmup)
    for step in range(min(warmup, steps)):
        assert found[step] == pytest.approx(TOP * (step + 1) / warmup)
    decay = found[max(warmup - 1, 0) :]
    for before, after in pairwise(decay):
        assert LOW <= after <= before * (1 + 1e-12) <= TOP * (1 + 1e-9)


@given(st.sampled_from(("cosine", "linear", "wsd")), st.integers(2, 80), st.integers(0, 1))
def test_the_lowest_rate_is_reached_at_the_end_and_kept(kind, steps, warmup):
    assert rates(steps, kind=kind, warmup_steps=warmup)[-1] == pytest.approx(LOW)
    early = ScheduleConfig(kind=kind, decay_steps=steps)
    if kind != "wsd":
        assert learning_rate(steps + 50, 2 * steps, OPTIMIZER, early) == pytest.approx(LOW)


def test_shapes_by_hand():
    steps = 100
    assert rates(steps, kind="constant") == [TOP] * 101
    linear = rates(steps, kind="linear", warmup_steps=20)
    assert linear[60] == pytest.approx((TOP + LOW) / 2)
    cosine = rates(steps, kind="cosine", warmup_steps=20)
    assert cosine[60] == pytest.approx((TOP + LOW) / 2)
    assert cosine[40] == pytest.approx(LOW + (TOP - LOW) * (1 + math.cos(math.pi / 4)) / 2)
    wsd = rates(steps, kind="wsd", warmup_steps=5)
    assert wsd[5:81] == [TOP] * 76  # the last fifth falls
    assert wsd[90] == pytest.approx((TOP + LOW) / 2)
    assert rates(steps, kind="wsd", decay_steps=50)[75] == pytest.approx((TOP + LOW) / 2)
    assert rates(steps, kind="linear", decay_steps=50)[25] == pytest.approx((TOP + LOW) / 2)


def test_a_run_that_was_made_longer_has_the_same_warmup():
    assert rates(50, kind="cosine", warmup_steps=10)[:10] == rates(500, kind="cosine", warmup_steps=10)[:10]
