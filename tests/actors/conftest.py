"""Groups of actors that this room's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raytron.actors import ActorGroup, Session
from raytron.parallel import Mesh
from tests.actors.engines import Toy


@pytest.fixture(scope="session")
def four(cluster: Session) -> Iterator[ActorGroup]:
    """Four ranks (dp 2, tp 2), started once."""
    with ActorGroup(Mesh(dp=2, tp=2)) as group:
        yield group


@pytest.fixture
def group(four: ActorGroup) -> ActorGroup:
    """`four`, whole again after whatever the last test did to it, with a fresh `Toy` on every rank."""
    if four.broken is not None:
        four.regroup()
    four.create(Toy)
    return four
