"""Small corpora and datasets that the data tests share."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from raytron.data import IndexedDataset, IndexedDatasetWriter

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    """The folder of real texts beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real texts are only read in place")
    return SHARED


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((Path(__file__).parent / "golden" / "gpt_index_golden.json").read_text())


@pytest.fixture
def make_indexed(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """Writes documents (lists of ids) and opens them."""

    def make(documents: Sequence[Sequence[int]], name: str = "corpus", dtype: type = np.uint16) -> IndexedDataset:
        with IndexedDatasetWriter(tmp_path / name, dtype) as writer:
            for document in documents:
                writer.add_document(list(document))
        return IndexedDataset(tmp_path / name)

    return make
