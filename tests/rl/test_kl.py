"""KL estimators on an alphabet small enough to take every expectation exactly: which gradients are whose."""

import math

import numpy as np
import pytest
import torch

from raytron.rl.kl import k1, k2, k3, kl_loss
from tests.rl.batches import difference_quotients, gradient

SYMBOLS = 6
random = np.random.default_rng(0)
LOGITS, REFERENCE, BEHAVIOUR = (random.normal(size=SYMBOLS) for _ in range(3))


def log_softmax(logits) -> torch.Tensor:
    return torch.log_softmax(torch.as_tensor(logits), -1)


def divergence(logits, other) -> torch.Tensor:
    """KL(softmax(logits) || softmax(other)), exactly."""
    a, b = log_softmax(logits), log_softmax(other)
    return (a.exp() * (a - b)).sum()


def expectation(loss, behaviour):
    """The expected loss as a function of the current logits, with symbols sampled from `behaviour`."""
    log_behaviour = log_softmax(behaviour)
    return lambda logits: (log_behaviour.exp() * loss(log_softmax(logits), log_softmax(REFERENCE), log_behaviour)).sum()


REVERSE = gradient(lambda logits: divergence(logits, REFERENCE), LOGITS)
FORWARD = gradient(lambda logits: divergence(REFERENCE, logits), LOGITS)


def test_by_hand():
    a, b = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert k1(a, b).item() == pytest.approx(math.log(2))
    assert k2(a, b).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(a, b).item() == pytest.approx(0.5 + math.log(2) - 1)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_unbiased_as_numbers(estimator):
    mean = expectation(lambda a, b, _: estimator(a, b), LOGITS)(LOGITS)
    assert mean.item() == pytest.approx(divergence(LOGITS, REFERENCE).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "expected"), [(k1, np.zeros(SYMBOLS)), (k2, REVERSE), (k3, FORWARD)], ids=["k1", "k2", "k3"]
)
def test_plain_estimators_as_losses(estimator, expected):
    """k1 teaches nothing, k2 is right, k3 pulls by the other divergence: why `kl_loss` is not simply these."""
    found = gradient(expectation(lambda a, b, _: estimator(a, b), LOGITS), LOGITS)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_two_divergences_differ():
    assert np.abs(REVERSE - FORWARD).max() > 0.01


@pytest.mark.parametrize("behaviour", [LOGITS, BEHAVIOUR], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_loss_has_the_gradient_of_the_divergence(estimator, behaviour):
    found = gradient(expectation(lambda a, b, g: kl_loss(estimator, a, b, g), behaviour), LOGITS)
    np.testing.assert_allclose(found, REVERSE, atol=1e-12)


def test_the_two_losses_have_one_gradient_token_by_token():
    a, b, g = (random.normal(-1, 0.3, 8) for _ in range(3))
    k2_T, k3_T = (
        gradient(lambda x, e=e: kl_loss(e, x, torch.as_tensor(b), torch.as_tensor(g)).sum(), a) for e in ("k2", "k3")
    )
    np.testing.assert_allclose(k2_T, np.exp(a - g) * (a - b), rtol=1e-12)
    np.testing.assert_allclose(k3_T, k2_T, rtol=1e-9)


def test_k3_loss_against_differences():
    a, b, g = (random.normal(-1, 0.3, 8) for _ in range(3))

    def loss(x):
        return kl_loss("k3", torch.as_tensor(x), torch.as_tensor(b), torch.as_tensor(g)).sum()

    np.testing.assert_allclose(gradient(loss, a), difference_quotients(loss, a), atol=1e-8)


def test_k3_is_never_negative_and_never_overflows():
    a = torch.tensor([0.0, -1e4, -1.0, -1.0 - 1e-6], requires_grad=True)
    b = torch.tensor([-1e4, 0.0, -1.0, -1.0])
    estimates = k3(a, b)
    estimates.sum().backward()
    assert (estimates >= 0).all()
    assert estimates.isfinite().all()
    assert a.grad.isfinite().all()
