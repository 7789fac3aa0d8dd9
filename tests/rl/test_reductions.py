"""Reductions are weights of the whole batch's counts: by hand, and the same however the batch is cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.rl.reductions import reduction_weights
from tests.rl.batches import batch_of, batches, properties, trajectory

BATCH = batch_of([trajectory(".##.#"), trajectory("#.")])


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token", [0, 1 / 4, 1 / 4, 0, 1 / 4, 1 / 4, 0]),
        ("sequence", [0, 1 / 6, 1 / 6, 0, 1 / 6, 1 / 2, 0]),
        ("constant", [0, 1 / 20, 1 / 20, 0, 1 / 20, 1 / 20, 0]),
    ],
)
def test_by_hand(reduction, expected):
    """Tokens that were not chosen count neither in sums nor in lengths."""
    weights = reduction_weights(BATCH, reduction, constant_length=10)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, expected)


@properties
@given(batches(), st.sampled_from(["token", "sequence"]))
def test_means_have_weights_that_sum_to_one(drawn, reduction):
    assert reduction_weights(drawn[0], reduction).sum() == pytest.approx(1.0)


@properties
@given(batches(min_size=2), st.randoms())
def test_token_mean_is_not_the_mean_of_parts(drawn, random):
    """The weights of a part, computed from the part, are not those of the whole; its share of the whole's are."""
    batch, _ = drawn
    whole = batch.having(weights=reduction_weights(batch, "token"))
    rows = sorted(random.sample(range(len(batch)), len(batch) // 2))
    part = whole.select(rows)
    share = part.response_lengths.sum() / batch.response_lengths.sum()
    np.testing.assert_allclose(part.fields["weights"], reduction_weights(part, "token") * share, rtol=1e-6)
