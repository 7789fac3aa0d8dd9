"""Nodes with replicas leave, and every request is answered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whole_answers_outlive_a_node_that_is_told_to_leave_and_one_that_is_gone(model_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.node_loss", model_path],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=290,
    )  # fmt: skip
    assert done.stdout.strip().endswith("ok"), done.stdout + done.stderr
