"""Statistics of a step's rollouts, by hand and by counting."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.rl.statistics import best_of, effective_share, pass_at, statistics, success_statistics
from raytron.rl.types import Batch, Group
from tests.rl.batches import batch_of, properties, trajectory


@properties
@given(st.lists(st.integers(0, 4), min_size=1, max_size=7), st.data())
def test_pass_and_best_are_means_over_all_choices(rewards, data):
    k = data.draw(st.integers(1, len(rewards)))
    choices = list(combinations(rewards, k))
    correct = sum(reward >= 3 for reward in rewards)
    assert pass_at(k, len(rewards), correct) == pytest.approx(np.mean([max(c) >= 3 for c in choices]))
    assert best_of(k, np.array(rewards, dtype=float)) == pytest.approx(np.mean([max(c) for c in choices]))


@pytest.mark.parametrize("k", [0, 3])
def test_more_cannot_be_chosen_than_there_are(k):
    with pytest.raises(ValueError, match=f"cannot choose {k} of 2"):
        pass_at(k, 2, 1)
    with pytest.raises(ValueError, match=f"cannot choose {k} of 2"):
        best_of(k, np.zeros(2))


def test_success_goes_as_far_as_every_group():
    """A failed trajectory is not a wrong one: it makes its group smaller."""
    groups = [
        Group(0, tuple(trajectory("#", reward) for reward in (1.0, 0.0, 0.0, 0.5))),
        Group(1, (trajectory("#", 1.0), trajectory("#", None), trajectory("#", 0.0), trajectory("#", 0.0))),
        Group(2, (trajectory("#", None),)),
    ]
    found = success_statistics(groups)
    assert list(found) == ["pass@1", "best@1", "pass@2", "best@2"]
    assert found["pass@1"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert found["pass@2"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["best@2"] == pytest.approx(((3 + 2 * 0.5) / 6 + 2 / 3) / 2)


def test_by_hand():
    groups = [
        Group(3, (trajectory(".##", 1.0, versions=[0, 7, 5], truncated=True), trajectory("#", 0.0, versions=6))),
        Group(4, (trajectory("###", 0.5, versions=7), trajectory("#", None))),
        Group(5, (trajectory("#", 2.0, versions=7), trajectory("#", 2.0, versions=7))),
    ]
    passed_over = [Group(1, (trajectory("#", 0.1),) * 3), Group(2, (trajectory("#", None),))]
    found = statistics(groups, Batch.of(groups), 7, passed_over)
    assert found == pytest.approx(
        {
            "reward_mean": 1.1,
            "reward_sampled_mean": (5 * 1.1 + 3 * 0.1) / 8,
            "reward_std": 0.8,
            "reward_min": 0.0,
            "reward_max": 2.0,
            "response_length_mean": 1.6,
            "response_length_max": 3.0,
            "truncated_share": 0.2,
            "zero_variance_share": 2 / 3,
            "excluded": 1.0,
            "staleness_mean": 0.6,
            "staleness_max": 2.0,
            "pass@1": 0.5,
            "best@1": 1.0,
        }
    )
    assert all(isinstance(value, float) for value in found.values())


def test_explained_variance():
    groups = [Group(0, (trajectory("##.#", 1.0),))]
    batch = batch_of(groups[0].trajectories)
    returns = np.array([0.0, 1.0, 99.0, 2.0])
    perfect = statistics(groups, batch.having(values=returns, returns=returns), 0)
    constant = statistics(groups, batch.having(values=np.ones(4), returns=returns), 0)
    assert perfect["explained_variance"] == 1.0
    assert constant["explained_variance"] == 0.0


def test_effective_share():
    rho = np.array([1.0, 1.0, 4.0])
    assert effective_share(rho.mean(), (rho**2).mean()) == pytest.approx(36 / 18 / 3)
    assert effective_share(1.0, 1.0) == 1.0
    assert effective_share(0.0, 0.0) == 0.0
