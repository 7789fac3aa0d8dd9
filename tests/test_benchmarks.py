"""The benchmark scripts run, at toy size: what they print are rows; the GPU script is right and needs torch alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = (
    "train_step.py",
    "actor_overhead.py",
    "checkpoint.py",
    "startup.py",
    "generate.py",
    "serve.py",
    "learning.py",
    "faults.py",
    "elastic_faults.py",
    "weight_sync.py",
    "grpo_step.py",
    "async.py",
    "elastic.py",
    "elastic_rl.py",
    "gpu/train.py",
)
# What a machine with torch, numpy and safetensors alone does not have.
ABSENT = ("ray", "transformers", "tokenizers", "xxhash", "pyarrow", "rich", "tyro", "matplotlib", "tensorboard")
WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))  # importing a name that is None there fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command: object) -> str:
    """What a script prints; `command` is its path under benchmarks/ and its arguments, or -c, a program, and those."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows_of(printed: str) -> list[dict]:
    """The rows a script printed, each one well-formed."""
    rows = [json.loads(line) for line in printed.splitlines()]
    for row in rows:
        assert {"benchmark", "case", "ours", "unit", "details"} <= row.keys()
        assert ("peer" in row) == ("peer_name" in row)
        if "ratio" in row:
            up, down = row["ours"] / row["peer"], row["peer"] / row["ours"]
            assert min(abs(row["ratio"] / up - 1), abs(row["ratio"] / down - 1)) < 1e-3
    return rows


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str):
    assert "--quick" in run(ROOT / "benchmarks" / script, "--help")


def test_gpu_training_is_right_and_needs_torch_alone(tmp_path: Path):
    page = tmp_path / "gpu_train.md"
    script = ROOT / "benchmarks" / "gpu" / "train.py"
    rows = rows_of(run("-c", WITHOUT, script, "--size", "toy", "--modes", "eager", "--force", "--output", page))
    parity = {row["case"]: row["details"]["passes"] for row in rows if row["case"].startswith("parity")}
    assert all(parity.values())
    assert {"parity llama fp32 tp4 sequence parallel", "parity qwen3 bf16 tp2"} <= parity.keys()
    speed = [row for row in rows if row["unit"] == "TFLOP/s"]
    assert len(speed) == 1
    assert speed[0]["details"]["tokens/s"] > 0
    assert "ratio" not in speed[0]
    assert all(row["case"] in page.read_text() for row in rows)


@pytest.mark.slow
def test_parity_notices_a_wrong_collective(tmp_path: Path):
    # The same script with a line that forgets to sum: what it reports must be what decides its exit status.
    script = tmp_path / "gpu" / "train.py"
    script.parent.mkdir()
    source = (ROOT / "benchmarks" / "gpu" / "train.py").read_text()
    broken = source.replace("torch.stack(tuple(ts)).sum(0)", "ts[0].clone()")
    assert broken != source
    script.write_text(broken)
    (tmp_path / "_common.py").write_text((ROOT / "benchmarks" / "_common.py").read_text())
    command = [sys.executable, str(script), "--size", "toy", "--modes", "", "--force"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1
    assert "off by more than the tolerance: parity llama fp32 tp2" in done.stderr


def test_checkpoint():
    rows = rows_of(run(ROOT / "benchmarks" / "checkpoint.py", "--size", "toy", "--force"))
    assert len(rows) == 8
    assert sum("ratio" in row for row in rows) == 4
    assert all("fp32" in row["case"] or "bf16" in row["case"] for row in rows)


@pytest.mark.slow
def test_actor_overhead():
    (row,) = rows_of(run(ROOT / "benchmarks" / "actor_overhead.py", "--size", "toy", "--force"))
    assert row["case"] == "dp2 fp32"
    assert "ratio" in row


@pytest.mark.slow
def test_startup():
    rows = rows_of(run(ROOT / "benchmarks" / "startup.py", "--size", "toy", "--force"))
    cached = {row["case"].rpartition(" ")[2]: row["ours"] for row in rows if "cached data: of which" in row["case"]}
    total = next(row["ours"] for row in rows if row["case"].endswith("cached data: command to first step"))
    assert sum(cached.values()) == pytest.approx(total, rel=1e-3)


@pytest.mark.slow
def test_generate(tmp_path: Path):
    page = tmp_path / "generate.md"
    rows = rows_of(run(ROOT / "benchmarks" / "generate.py", "--size", "toy", "--force", "--output", page))
    names = [f"toy-{dtype}-b{batch}" for dtype in ("fp32", "bf16") for batch in (1, 3)]
    assert [row["case"] for row in rows if "target" in row["details"]] == names
    assert all(("ratio" in row) == ("peer" in row and row["case"] in names) for row in rows)
    beside = {f"toy-{dtype}-b3-{what}" for dtype in ("fp32", "bf16") for what in ("transformers", "reproducible")}
    assert {row["case"] for row in rows} == {*names, *beside}
    assert all(row["case"] in page.read_text() for row in rows)


@pytest.mark.slow
def test_serve(tmp_path: Path):
    page = tmp_path / "serve.md"
    rows = rows_of(run(ROOT / "benchmarks" / "serve.py", "--models", "toy", "--force", "--output", page))
    cases = ["ttft-p50", "ttft-p99", "tpot", "saturation", "http-ttft-p50", "http-tpot", "ray-ttft-p50", "ray-tpot"]
    assert [row["case"] for row in rows] == [f"toy-bf16-{case}" for case in cases]
    assert all(row["ours"] > 0 and "ratio" not in row for row in rows)
    assert all(row["case"] in page.read_text() for row in rows)


@pytest.mark.slow
def test_learning(tmp_path: Path):
    page = tmp_path / "learning.md"
    rows = rows_of(
        run(ROOT / "benchmarks" / "learning.py", "--only", "vLLM", "--seeds", 1, "--steps", 2, "--output", page)
    )
    assert [row["case"] for row in rows] == ["echo-digit grpo vLLM"]
    assert rows[0]["details"]["steps"] == 2
    assert page.with_suffix(".png").exists()


@pytest.mark.slow
def test_faults(tmp_path: Path):
    rows = rows_of(run(ROOT / "benchmarks" / "faults.py", "--seeds", 1, "--output", tmp_path / "faults.md"))
    assert rows[-1]["ours"] == 1.0


@pytest.mark.slow
def test_elastic_faults(tmp_path: Path):
    page = tmp_path / "elastic_faults.md"
    rows = rows_of(run(ROOT / "benchmarks" / "elastic_faults.py", "--quick", "--faults", 2, "--output", page))
    assert rows[0]["ours"] == 1.0
    assert rows[0]["details"]["faults"] == 2


@pytest.mark.slow
def test_weight_sync(tmp_path: Path):
    rows = rows_of(
        run(ROOT / "benchmarks" / "weight_sync.py", "--size", "toy", "--force", "--output", tmp_path / "w.md")
    )
    assert [row["case"] for row in rows] == [f"toy-{d}-{how}" for d in ("fp32", "bf16") for how in ("full", "delta")]


@pytest.mark.slow
def test_grpo_step(tmp_path: Path):
    (row,) = rows_of(
        run(ROOT / "benchmarks" / "grpo_step.py", "--size", "toy", "--force", "--output", tmp_path / "g.md")
    )
    assert row["case"] == "toy-fp32-toy"


@pytest.mark.slow
def test_async(tmp_path: Path):
    rows = rows_of(
        run(ROOT / "benchmarks" / "async.py", "--quick", "--steps", 3, "--force", "--output", tmp_path / "a.md")
    )
    assert [row["case"] for row in rows] == ["echo-digit fp32 staleness 1", "echo-digit fp32 staleness 2"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_elastic():
    rows = rows_of(run(ROOT / "benchmarks" / "elastic.py", "--quick", "--case", "cold", "--size", "toy", "--force"))
    by = {row["case"].partition("cold: ")[2]: row for row in rows}
    assert "ratio" in by["fault to the next step"]
    assert by["steps lost"]["ours"] == 0
    assert by["bytes moved"]["details"]["equal in all"]
    assert {"of which detect", "of which rendezvous", "of which move"} <= by.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_elastic_rl(tmp_path: Path):
    page = tmp_path / "elastic_rl.md"
    rows = rows_of(run(ROOT / "benchmarks" / "elastic_rl.py", "--quick", "--window", 2, "--force", "--output", page))
    cases = ["an engine killed", "an engine left and joined", "all of it"]
    assert [row["case"] for row in rows] == [f"echo-digit fp32 {case}" for case in cases]
    assert all(row["ours"] > 0 and "ratio" in row and row["case"] in page.read_text() for row in rows)
