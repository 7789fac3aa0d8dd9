"""The guard's decisions, from numbers alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.config import GuardConfig
from raytron.models import build
from raytron.parallel.collectives import World
from raytron.training import TrainingStopped
from raytron.training.engine import Record
from raytron.training.guard import WARM_STEPS, Culprit, Guard, find_culprit
from tests.training.engines import ARCHS

NORMS = st.floats(1e-3, 1e3)
BAD = st.sampled_from([math.nan, math.inf, -math.inf])


@given(BAD, NORMS, st.booleans())
def test_no_bad_number_passes(bad, good, in_loss):
    loss, norm = (bad, good) if in_loss else (good, bad)
    assert Guard(GuardConfig()).judge(loss, norm, Record()) == "non-finite"
    assert Guard(GuardConfig()).judge(good, good, Record()) is None


@given(NORMS, st.floats(1.01, 100), st.floats(0.01, 200), st.integers(0, 2 * WARM_STEPS))
def test_a_spike_is_a_norm_beyond_the_factor_once_the_mean_is_known(mean, factor, ratio, updates):
    record = Record(updates=updates, norm_mean=mean)
    skip = Guard(GuardConfig(spike_factor=factor)).judge(1.0, ratio * mean, record)
    assert (skip == "spike") == (updates >= WARM_STEPS and ratio * mean > factor * mean)
    assert Guard(GuardConfig()).judge(1.0, ratio * mean, record) is None


@given(st.lists(st.tuples(st.sampled_from([None, "spike", "non-finite"]), NORMS), max_size=40))
def test_counts_add_up_and_the_mean_stays_among_the_norms(decisions):
    guard, record = Guard(GuardConfig()), Record()
    for skip, norm in decisions:
        guard.count(record, skip, norm)
    skips = [skip for skip, _ in decisions]
    assert (record.updates, record.skipped) == (skips.count(None), len(skips) - skips.count(None))
    assert record.nan_steps == skips.count("non-finite")
    trailing = next((i for i, skip in enumerate(reversed(skips)) if skip is None), len(skips))
    assert record.consecutive_skips == trailing
    norms = [norm for skip, norm in decisions if skip is None]
    if norms:
        assert min(norms) * (1 - 1e-9) <= record.norm_mean <= max(norms) * (1 + 1e-9)


@given(st.integers(1, 5), st.integers(0, 10))
def test_it_stops_exactly_when_too_many_in_a_row_were_skipped(most, skipped):
    guard, record = Guard(GuardConfig(max_consecutive_skips=most)), Record(step=9, consecutive_skips=skipped)
    if skipped < most:
        guard.check(record, None)
        return
    with pytest.raises(
        TrainingStopped, match=rf"^{skipped} steps in a row .* step 9\. The weights .* lower optimizer.lr"
    ):
        guard.check(record, None)


def test_weights_are_named_before_gradients_and_nothing_where_all_is_finite():
    model = build(ARCHS["untied"], seed=1)
    grads = torch.zeros_like(model.weights)
    assert find_culprit(model, grads, World.single(), False) is None
    slots = {slot.param.parts[0].name: slot for slot in model.slots}
    for name in ("lm_head.weight", "model.layers.0.mlp.gate_proj.weight"):
        grads[slots[name].offset] = torch.nan
    assert find_culprit(model, grads, World.single(), True) == Culprit("gradient", "lm_head.weight", 0)
    for name in ("model.layers.2.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"):
        slots[name].param.data.view(-1)[0] = torch.inf
    found = find_culprit(model, grads, World.single(), True)
    assert str(found) == "weight of model.layers.1.input_layernorm.weight on rank 0"
