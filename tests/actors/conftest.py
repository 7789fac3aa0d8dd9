"""Ray comes up once for all of this room's tests, on ports and in a folder of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from raytron.actors import ActorGroup, Session
from raytron.parallel import Mesh
from tests.actors.engines import Toy


@pytest.fixture(scope="session")
def cluster() -> Iterator[Session]:
    """A local Ray with eight CPU slots."""
    os.environ.pop("RAY_ADDRESS", None)
    folder = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # pytest's own folders are too deep for sockets
    with Session(8, temp_dir=folder) as session:
        yield session
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def four(cluster: Session) -> Iterator[ActorGroup]:
    """Four ranks (dp 2, tp 2), started once."""
    with ActorGroup(Mesh(dp=2, tp=2)) as group:
        yield group


@pytest.fixture
def group(four: ActorGroup) -> ActorGroup:
    """`four`, whole again after whatever the last test did to it, with a fresh `Toy` on every rank."""
    if four._broken is not None:
        four.regroup()
    four.create(Toy)
    return four
