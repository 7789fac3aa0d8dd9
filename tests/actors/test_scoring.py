"""Scorers in actors: what they say is what one would say, whichever of them die or hang; nothing is ever made up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytron.actors import CapacityError, ScorerGroup, ScoringError, Session
from tests.actors.scorers import Failing
from tests.inference.classifiers import random_classifier, scores_of, sequences

EACH = {"CPU": 0.5}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """The model's folder, and its scores of `sequences(24)`."""
    folder, model = random_classifier(tmp_path_factory.mktemp("scorer"))
    return folder, scores_of(model, sequences(24))


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 240))


async def all_of(group: ScorerGroup) -> np.ndarray:
    return np.stack(await asyncio.gather(*(group.score(tokens) for tokens in sequences(24))))


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("kill", {"replicas": 2, "most_tokens": 100}),
        ("kill", {"tp": 2}),
        ("hang", {"timeout_s": 2.0}),
    ],
)
def test_scores_are_the_models_own_though_replicas_fail(cluster: Session, classifier, how, options):
    folder, wanted = classifier

    async def main() -> None:
        options_ = {"each": EACH, "max_failures": -1, "attempts": 9, **options}
        states: list[str] = []
        async with ScorerGroup(Failing, (folder,), **options_) as group:
            group.on_state = lambda replica, what: states.append(what)
            np.testing.assert_allclose(await all_of(group), wanted, atol=1e-5, rtol=1e-5)
            assert group.failures == 0 or how == "hang"
            Path(folder, "fail").write_text(how)
            np.testing.assert_allclose(await all_of(group), wanted, atol=1e-5, rtol=1e-5)
            assert group.failures > 0
            assert {"scoring", "idle", "restarting"} == set(states)

    run(main)


def test_when_no_replica_is_left_nothing_is_scored(cluster: Session, tmp_path):
    folder, _ = random_classifier(tmp_path)
    Path(folder, "fail").write_text("always")

    async def main() -> None:
        async with ScorerGroup(Failing, (folder,), each=EACH, max_failures=9, attempts=2) as group:
            with pytest.raises(ScoringError, match="failed 2 times, last: process died"):
                await group.score([1, 2])
        states: dict[int, str] = {}
        async with ScorerGroup(Failing, (folder,), replicas=2, each=EACH, max_failures=0, attempts=9) as group:
            group.on_state = states.__setitem__
            found = await asyncio.gather(*(group.score([1, 2]) for _ in range(6)), return_exceptions=True)
            assert {str(error).split(":")[0] for error in found} == {"no scorer is left"}
            with pytest.raises(ScoringError, match="no scorer is left"):
                await group.score([1, 2])
        assert "lost" in states.values()
        with pytest.raises(ScoringError):
            await group.score([1])

    run(main)


def test_scorers_that_find_no_seats_leave_nothing(cluster: Session, classifier):
    with pytest.raises(CapacityError):
        run(ScorerGroup(Failing, (classifier[0],), each={"CPU": 1000}, wait_s=0.5).start)
