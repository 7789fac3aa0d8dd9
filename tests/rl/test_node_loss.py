"""Nodes come and go in the middle of a run, and it ends as if they had not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_outlives_its_engines_node_and_a_trainer_ranks_and_changes_their_number(tmp_path: Path):
    """With the same numbers to the bit, and every group trained on once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.rl.node_loss", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert done.stdout.strip().endswith("ok"), done.stdout + done.stderr
