"""Off-policy corrections by hand. rho is trainer over engine, always."""

import math

import numpy as np
import pytest
import torch

from raytron.rl.corrections import CORRECTIONS
from tests.rl.batches import batch_of, tokens_of, trajectory

# Sequence 0: rho 4, (masked), 0.25, 1; sequence 1: rho 1.1, 1.1. Products 1 and 1.21, geometric means 1 and 1.1.
RHO = [4.0, 1e9, 0.25, 1.0, 1.1, 1.1]
CHOSEN = [0, 2, 3, 4, 5]


def weights(kind: str, low: float, high: float, rho=RHO):
    batch = batch_of([trajectory("#.##"), trajectory("##")]).having(advantages=np.zeros(6))
    log_rho = torch.tensor(rho, dtype=torch.float64).log().requires_grad_()
    found, outside = CORRECTIONS[kind].weights(log_rho, tokens_of(batch, torch.zeros(6)), low, high)
    assert not found.requires_grad
    return found[CHOSEN].tolist(), outside[CHOSEN].tolist()


@pytest.mark.parametrize(
    ("kind", "low", "high", "expected", "outside"),
    [
        ("tis", 0.0, 2.0, [2.0, 0.25, 1.0, 1.1, 1.1], [1, 0, 0, 0, 0]),
        ("tis", 0.5, 2.0, [2.0, 0.5, 1.0, 1.1, 1.1], [1, 1, 0, 0, 0]),
        ("icepop", 0.5, 5.0, [4.0, 0.0, 1.0, 1.1, 1.1], [0, 1, 0, 0, 0]),
        ("mask-token", 0.5, 2.0, [0.0, 0.0, 1.0, 1.0, 1.0], [1, 1, 0, 0, 0]),
        ("sequence-tis", 0.0, 1.2, [1.0, 1.0, 1.0, 1.2, 1.2], [0, 0, 0, 1, 1]),
        ("mask-sequence", 0.95, 1.05, [1.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 0, 1, 1]),
        ("mask-sequence", 0.95, 1.15, [1.0, 1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0, 0]),
        ("mask-sequence-product", 0.95, 1.15, [1.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 0, 1, 1]),
    ],
)
def test_by_hand(kind, low, high, expected, outside):
    found = weights(kind, low, high)
    np.testing.assert_allclose(found[0], expected)
    assert found[1] == [bool(o) for o in outside]


@pytest.mark.parametrize(("rho", "kept"), [(1.65, False), (1.55, True), (0.61, True), (0.59, False)])
def test_bounds_are_on_trainer_over_engine(rho, kept):
    """Of engine over trainer, 0.6 .. 1.6 would keep 1.65 and drop 0.61."""
    assert (weights("mask-token", 0.6, 1.6, [rho] * 6)[0] == [1.0] * 5) is kept


def test_the_geometric_mean_does_not_depend_on_length_and_the_product_does():
    for length in (2, 200):
        batch = batch_of([trajectory("#" * length)]).having(advantages=np.zeros(length))
        log_rho = torch.full((length,), math.log(1.005), dtype=torch.float64)
        tokens = tokens_of(batch, log_rho)
        assert CORRECTIONS["mask-sequence"].weights(log_rho, tokens, 0.99, 1.01)[0].all()
        kept = CORRECTIONS["mask-sequence-product"].weights(log_rho, tokens, 0.99, 1.02)[0].bool()
        assert kept.all().item() is (length == 2)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_equal_policies_need_no_correction(kind):
    correction = CORRECTIONS[kind]
    assert weights(kind, correction.low, correction.high, [1.0] * 6) == ([1.0] * 5, [False] * 5)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_weights_stay_finite(kind):
    correction = CORRECTIONS[kind]
    assert np.isfinite(weights(kind, correction.low, correction.high, [1e300] * 6)[0]).all()
