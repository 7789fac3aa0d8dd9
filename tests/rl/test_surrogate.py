"""Ratios and the clipped objective, by hand and against finite differences."""

import numpy as np
import pytest
import torch

from raytron.rl.surrogate import bounded_exp, clipped_surrogate, sequence_mean, sequence_sum
from tests.rl.batches import batch_of, difference_quotients, gradient, tokens_of, trajectory

CASES = [  # ratio, advantage, loss, whether a bound holds; clip 0.8 .. 1.28
    (1.0, 2.0, -2.0, False),
    (1.2, 2.0, -2.4, False),
    (1.5, 2.0, -2.56, True),
    (0.5, 2.0, -1.0, False),
    (0.5, -2.0, 1.6, True),
    (1.5, -2.0, 3.0, False),
    (9.0, -2.0, 18.0, False),
    (9.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "clipped"), CASES)
def test_clip_by_hand(ratio, advantage, loss, clipped):
    l, c = clipped_surrogate(torch.tensor([ratio]), torch.tensor([advantage]), 0.2, 0.28)
    assert l.item() == pytest.approx(loss)
    assert c.item() is clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [(9.0, -2.0, 6.0, True), (2.9, -2.0, 5.8, False), (0.5, -2.0, 1.6, True), (9.0, 2.0, -2.56, True)],
)
def test_dual_clip_bounds_negative_advantages_only(ratio, advantage, loss, clipped):
    l, c = clipped_surrogate(torch.tensor([ratio]), torch.tensor([advantage]), 0.2, 0.28, dual=3.0)
    assert l.item() == pytest.approx(loss)
    assert c.item() is clipped


def test_gradients_are_the_differences_and_zero_where_a_bound_holds():
    log_ratio = np.log([1.1, 1.5, 0.5, 0.5, 1.5, 9.0, 0.9])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0, 0.0], dtype=torch.float64)

    def loss(x):
        return clipped_surrogate(bounded_exp(torch.as_tensor(x)), advantages, 0.2, 0.28, dual=3.0)[0].sum()

    found = gradient(loss, log_ratio)
    np.testing.assert_allclose(found, difference_quotients(loss, log_ratio), atol=1e-8)
    np.testing.assert_allclose(found, [-2.2, 0.0, -1.0, 0.0, 3.0, 0.0, 0.0])


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
def test_a_forbidden_token_overflows_nothing(log_ratio):
    x = torch.tensor([log_ratio], requires_grad=True)
    loss, _ = clipped_surrogate(bounded_exp(x), torch.tensor([-1.0]), 0.2, 0.2)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()
    assert bounded_exp(x).square().isfinite().all()


def test_sequence_sums_leave_masked_tokens_out():
    batch = batch_of([trajectory("#.#"), trajectory(".#")]).having(advantages=np.zeros(5))
    tokens = tokens_of(batch, torch.tensor([1.0, 50.0, 3.0, 70.0, 5.0]))
    assert sequence_sum(tokens.logprobs, tokens).tolist() == [4.0, 4.0, 4.0, 5.0, 5.0]
    assert sequence_mean(tokens.logprobs, tokens).tolist() == [2.0, 2.0, 2.0, 5.0, 5.0]


def test_a_sequence_without_chosen_tokens_has_mean_zero():
    batch = batch_of([trajectory("##")]).having(advantages=np.zeros(2))
    tokens = tokens_of(batch, torch.tensor([1.0, 2.0]), mask=torch.zeros(2))
    assert sequence_mean(tokens.logprobs, tokens).tolist() == [0.0, 0.0]
