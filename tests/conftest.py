"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from raytron.actors import Session

torch.set_num_threads(1)
settings.register_profile("raytron", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("raytron")


@pytest.fixture(scope="session")
def ranks():
    """Four rank processes for the whole session, see `RankPool`."""
    from tests.ranks import RankPool

    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Session]:
    """A local Ray with eight CPU slots, on ports and in a folder of its own, brought up once for all who ask."""
    from raytron.actors import Session

    os.environ.pop("RAY_ADDRESS", None)
    folder = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # pytest's own folders are too deep for sockets
    with Session(8, temp_dir=folder) as session:
        yield session
    shutil.rmtree(folder, ignore_errors=True)
