"""Fixtures shared by all rooms."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks():
    """Four rank processes for the whole session, see `RankPool`."""
    from tests.ranks import RankPool

    pool = RankPool(4)
    yield pool
    pool.close()
