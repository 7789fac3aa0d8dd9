"""What Ray's tables say that a run asked its autoscaler for."""

from __future__ import annotations

import json

import pytest
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

from raytron.actors.demand import Demand, bundles


@pytest.fixture
def told(cluster):
    """What was asked last, None if nothing."""
    yield lambda: json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "null")
    _internal_kv_del(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)


def test_the_whole_of_a_wish_is_told_once_and_taken_back(told):
    demand, each = Demand(active=True), {"CPU": 2.0, "GPU": 1.0, "memory": 0.0}
    assert demand.want(bundles((4, 4, 1), each))
    assert told() == [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert not demand.want(bundles((1, 4, 4), each))  # the same
    assert demand.want(bundles((4,), each))
    assert told() == [{"CPU": 8.0, "GPU": 4.0}]
    demand.close()
    assert told() == []


def test_nothing_is_asked_where_nobody_would_answer(told):
    demand = Demand(active=False)
    assert not demand.want([{"CPU": 1.0}])
    demand.close()
    assert told() is None
