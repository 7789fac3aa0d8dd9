"""Advantages by hand, and what must not change them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.rl.advantages import (
    gae,
    group_advantages,
    group_statistics,
    leave_one_out_advantages,
    overlong_charge,
    returns_to_go,
    token_rewards,
    varies,
    whiten,
)
from tests.rl.batches import batch_of, batches, properties, trajectory

ONE_OF_EIGHT = np.array([1.0, 0, 0, 0, 0, 0, 0, 0])


def test_one_success_of_eight():
    """The numbers by which implementations are told apart: sample deviation 2.47, population 2.65."""
    group = np.zeros(8)
    np.testing.assert_allclose(group_advantages(ONE_OF_EIGHT, group, True)[:2], [2.474867, -0.353552], atol=1e-5)
    np.testing.assert_allclose(group_advantages(ONE_OF_EIGHT, group, False)[:2], [0.875, -0.125])
    np.testing.assert_allclose(leave_one_out_advantages(ONE_OF_EIGHT, group)[:2], [1.0, -1 / 7])


def test_groups_are_found_by_their_ids():
    """Not by shape: ids are interleaved, sparse, and one group lost a trajectory."""
    rewards, groups = np.array([1.0, 10.0, 3.0, 20.0, 60.0]), np.array([7, 900, 7, 900, 900])
    size, mean, std = group_statistics(rewards, groups)
    assert size.tolist() == [2, 3, 2, 3, 3]
    assert mean.tolist() == [2.0, 30.0, 2.0, 30.0, 30.0]
    np.testing.assert_allclose(std, [2**0.5, 700**0.5, 2**0.5, 700**0.5, 700**0.5])
    np.testing.assert_allclose(group_advantages(rewards, groups, False), [-1.0, -20.0, 1.0, -10.0, 30.0])
    np.testing.assert_allclose(leave_one_out_advantages(rewards, groups), [-2.0, -30.0, 2.0, -15.0, 45.0])


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("rewards", [[5.0], [0.1] * 3, [0.1, 0.1 + 1e-9, 0.1]], ids=["one", "equal", "rounded"])
def test_groups_that_teach_nothing(rewards, normalize_std):
    """A group of one is not worth its raw reward, and rounding is not blown up to an advantage."""
    rewards = np.array(rewards)
    assert not varies(rewards)
    assert not group_advantages(rewards, np.zeros(len(rewards)), normalize_std).any()
    assert not leave_one_out_advantages(rewards, np.zeros(len(rewards))).any()


@properties
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20), st.randoms())
def test_advantages_do_not_depend_on_order(pairs, random):
    groups, rewards = np.array(pairs, dtype=np.float64).T
    order = list(range(len(pairs)))
    random.shuffle(order)
    for advantages in (leave_one_out_advantages, lambda r, g: group_advantages(r, g, True)):
        np.testing.assert_allclose(
            advantages(rewards[order], groups[order]), advantages(rewards, groups)[order], atol=1e-12
        )


@properties
@given(batches())
def test_group_advantages_sum_to_zero(drawn):
    batch, _ = drawn
    for advantages in (leave_one_out_advantages, lambda r, g: group_advantages(r, g, True)):
        found = advantages(batch.rewards, batch.groups)
        for group in np.unique(batch.groups):
            assert found[batch.groups == group].sum() == pytest.approx(0.0, abs=1e-9)


def test_token_rewards_by_hand():
    batch = batch_of([trajectory(".#.#.", 5.0), trajectory("#", 7.0)])
    charges = np.array([99.0, 0.5, 99.0, 0.25, 99.0, 1.0])
    assert token_rewards(batch.rewards, charges, batch).tolist() == [0.0, -0.5, 0.0, 4.75, 0.0, 6.0]


def test_returns_by_hand():
    batch = batch_of([trajectory("##.#"), trajectory("#")])
    returns = returns_to_go(np.array([1.0, 2.0, 99.0, 4.0, 8.0]), batch, gamma=0.5)
    assert returns.tolist() == [3.0, 4.0, 0.0, 4.0, 8.0]


def test_gae_by_hand():
    batch = batch_of([trajectory("###"), trajectory("#")])
    rewards, values = np.array([0.0, 0.0, 1.0, 2.0]), np.array([0.5, 0.4, 0.3, 0.5])
    found = gae(rewards, values, batch, gamma=0.9, lam=0.8)
    # deltas: 0.9 x 0.4 - 0.5, 0.9 x 0.3 - 0.4, 1 - 0.3; then A = delta + 0.72 A of the next
    np.testing.assert_allclose(found, [-0.14 + 0.72 * 0.374, -0.13 + 0.72 * 0.7, 0.7, 1.5])


def test_gae_of_gamma_and_lambda_one_is_return_less_value():
    batch = batch_of([trajectory("##.##", 3.0)])
    values = np.array([0.5, -1.0, 77.0, 2.0, 0.25])
    rewards = token_rewards(batch.rewards, np.zeros(5), batch)
    np.testing.assert_allclose(gae(rewards, values, batch, 1.0, 1.0), [2.5, 4.0, 0.0, 1.0, 2.75])


@properties
@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_observations_do_not_break_the_chain(drawn, gamma, lam):
    """Turns with anything said in between are worth what they are without it."""
    batch, x = drawn
    values = batch.fields["values"].astype(np.float64)
    dense = batch_of([trajectory("#" * length) for length in batch.response_lengths])
    chosen = batch.chosen
    np.testing.assert_allclose(
        gae(x, values, batch, gamma, lam)[chosen], gae(x[chosen], values[chosen], dense, gamma, lam)
    )
    np.testing.assert_allclose(
        returns_to_go(x, batch, gamma)[chosen], returns_to_go(x[chosen], dense, gamma), atol=1e-12
    )
    assert not gae(x, values, batch, gamma, lam)[~chosen].any()


def test_whitening_by_hand():
    found = whiten(np.array([1.0, 99.0, 2.0, 3.0]), np.array([True, False, True, True]))
    np.testing.assert_allclose(found, [-1.0, 0.0, 0.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("x", [[4.0], [0.1] * 3])
def test_whitening_what_does_not_vary_gives_zero(x):
    assert not whiten(np.array(x), np.ones(len(x), dtype=bool)).any()


def test_overlong_charge_by_hand():
    """Of 20 tokens the last 4 are charged; a response that got past 20 is not charged more."""
    charges = overlong_charge(np.array([3, 16, 17, 18, 20, 100]), longest=20, buffer=4, penalty=2.0)
    np.testing.assert_allclose(charges, [0.0, 0.0, -0.5, -1.0, -2.0, -2.0])
