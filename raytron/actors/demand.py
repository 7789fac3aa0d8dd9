"""What a run asks Ray's autoscaler for: room for all it wants, and nothing more once it wants less, or is over.

Placement groups that wait for room make an autoscaler act too, but a run that goes on with what it has waits for none.
Ray keeps one request for the whole cluster, the last one made: runs that share an autoscaled cluster overwrite each
other's. Without an autoscaler a request is a note in Ray's tables that nobody reads.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

__all__ = ["Demand", "bundles"]

log = logging.getLogger(__name__)


def bundles(together: Sequence[int], each: Mapping[str, float]) -> list[dict[str, float]]:
    """Ray's resources of so many ranks together on a node, for each of `together`; `each` is what one rank needs."""
    return [{name: need * ranks for name, need in each.items()} for ranks in together]


class Demand:
    """Of one run.

    Args:
        active: False asks for nothing, ever: in a Ray of one's own nobody would answer.
    """

    def __init__(self, active: bool) -> None:
        self._active = active
        self._asked: Counter[Any] = Counter()

    def want(self, wanted: Sequence[Mapping[str, float]]) -> bool:
        """Ask for room for these bundles, in all, unless it is what was asked last; whether it was another."""
        needs = [{name: need for name, need in bundle.items() if need > 0} for bundle in wanted]
        wish = Counter(tuple(sorted(bundle.items())) for bundle in needs)
        if not self._active or wish == self._asked:
            return False
        try:
            request_resources(bundles=needs)
        except RayError as error:  # the cluster itself is going; nothing here depends on an answer
            log.debug("while asking the autoscaler: %s", error)
            return False
        self._asked = wish
        return True

    def close(self) -> None:
        """Ask for nothing any more."""
        if ray.is_initialized():
            self.want(())
