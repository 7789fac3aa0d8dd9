"""Storage of both kinds, and storage that fails on demand."""

from __future__ import annotations

import pytest

from raytron.checkpoint import Storage


@pytest.fixture(params=["local", "remote"])
def location(request, tmp_path) -> str:
    """A path, and a URI: through pyarrow even a local folder has no rename, as object stores."""
    return str(tmp_path / "runs") if request.param == "local" else f"file://{tmp_path}/runs"


@pytest.fixture
def storage(location) -> Storage:
    return Storage.open(location)
