"""Recipes as their users run them: as scripts, under torchrun, and as jobs of a Ray cluster."""

from __future__ import annotations

import os
import re
import runpy
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytron.cli import parse
from raytron.config import cli

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
BIN = Path(sys.executable).parent
TINY = "--model.preset llama-3m --data.sequence-length 32 --global-batch-size 4 --steps 2 --evaluation.batches 1"
LAPTOP = [*TINY.split(), "--scaling.num-workers", "2", "--scaling.no-use-gpu", "--run.name", "laptop"]
LOSS = re.compile(r"step +(\d+) +loss (\d+\.\d+)")


def environment(**more: str) -> dict[str, str]:
    """This process's, without a cluster that it may belong to, and with the interpreter's tools found first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYTRON_"))}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}


def run(*command: object, cwd: Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment(**env), capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in LOSS.findall(output)}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_help_comes_without_torch_or_ray(recipe: Path, tmp_path: Path):
    code = f"""
import runpy, sys
sys.argv = [{recipe.name!r}, "--help"]
try:
    runpy.run_path({str(recipe)!r}, run_name="__main__")
finally:
    print([name for name in ("torch", "ray", "numpy", "transformers") if name in sys.modules])
"""
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"
    assert re.search(r"--(parallel\.|engine\.)?tp INT", done.stdout)
    assert "Tensor parallel size" in done.stdout, "the sentence below a field is its help"


def test_simple_loop_computes_the_same_steps_alone_and_on_two_ranks(tmp_path: Path):
    script = [ROOT / "recipes/simple_loop.py", "--steps", "3", "--global-batch-size", "4"]
    two = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", *script]
    alone = losses(run(sys.executable, *script, cwd=tmp_path).stdout)
    assert list(alone) == [1, 2, 3]
    assert losses(run(*two, cwd=tmp_path).stdout) == pytest.approx(alone, abs=2e-3)


def test_simple_loop_says_how_many_ranks_it_needs(tmp_path: Path):
    done = run(sys.executable, ROOT / "recipes/simple_loop.py", "--parallel.tp", "2", cwd=tmp_path, code=2)
    assert done.stderr.strip() == "torchrun started 1 ranks, the mesh has 2; start 2 in all"


def test_llama3_refuses_a_tokenizer_that_does_not_fit(tmp_path: Path):
    (tmp_path / "my.jsonl").write_text('{"text": "some text"}\n')
    options = ["--parallel.tp", "2", "--data.path", "my.jsonl"]
    done = run(sys.executable, ROOT / "recipes/llama3.py", *options, cwd=tmp_path, code=2)
    assert "257 entries" in done.stderr
    assert "128256" in done.stderr
    assert "data.tokenizer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_llama3_runs_on_a_laptop(tmp_path: Path):
    done = run(sys.executable, ROOT / "recipes/llama3.py", *LAPTOP, cwd=tmp_path)
    assert "run laptop" in done.stdout
    saved = tmp_path / "runs/laptop/checkpoints/step_00000002/model"
    assert (saved / "model.safetensors").is_file()
    assert (saved / "tokenizer.json").is_file()


@pytest.mark.slow
def test_the_recipe_in_the_readme_runs(tmp_path: Path):
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.py").write_text(block)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    done = run(sys.executable, "mine.py", "--steps", 2, "--parallel.tp", 1, "--parallel.pp", 2, cwd=tmp_path)
    assert "run mine" in done.stdout


@dataclass(frozen=True)
class Cluster:
    """A Ray head node with a dashboard, where jobs are submitted; its environment holds the token that lets one in."""

    address: str
    env: dict[str, str]
    cwd: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """On ports and in a folder of its own, in a session of its own, by which it is found and ended to the last process.

    Ray 2.60 guards local clusters with a token; RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH give both ends the same.
    """
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # pytest's own folders are too deep for sockets
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
        "--disable-usage-stats",
        f"--temp-dir={folder}",
    ]
    command += [f"--{name}={port}" for name, port in ports.items()]
    cwd, env = tmp_path_factory.mktemp("cluster"), environment(**auth)
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, cwd=cwd, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        found = Cluster(f"http://127.0.0.1:{ports['dashboard-port']}", auth, cwd)
        ping = [BIN / "ray", "job", "list", "--address", found.address]
        while subprocess.run(ping, env=env, capture_output=True).returncode:
            assert head.poll() is None, (folder / "head.log").read_text()
        yield found
    finally:
        head.terminate()  # `ray start --block` then ends what it started; what is left is ended one by one
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            head.kill()
        for process in session_of(head.pid):
            os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def session_of(leader: int) -> list[int]:
    """Processes of the session that `leader` began."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,sess="], capture_output=True, text=True, check=True).stdout
    pairs = (map(int, line.split()) for line in listed.splitlines())
    return [process for process, session in pairs if session == leader]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_as_a_job(cluster: Cluster):
    job = ["python", ROOT / "recipes/quickstart.py", "--steps", 2, "--evaluation.batches", 1]
    done = run("ray", "job", "submit", "--address", cluster.address, "--", *job, cwd=cluster.cwd, **cluster.env)
    assert "succeeded" in done.stdout
    assert "The model continues" in done.stdout
    assert (cluster.cwd / "runs/quickstart/checkpoints/step_00000002/model/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_fails_says_why_in_one_line(cluster: Cluster):
    job = ["python", ROOT / "recipes/llama3.py", *LAPTOP, "--data.path", "none.jsonl"]
    done = run("ray", "job", "submit", "--address", cluster.address, "--", *job, cwd=cluster.cwd, code=1, **cluster.env)
    assert "none.jsonl isn't there" in done.stdout
    assert "Traceback" not in done.stdout


# Documentation: every command that it prints is one that the programs understand


def commands(path: Path) -> list[list[str]]:
    """Command lines of the code blocks of a Markdown file, lines that end in a backslash joined."""
    blocks = re.findall(r"^```(?:bash|console)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def understood(command: list[str]) -> Any:
    """What a `raytron` or recipe command line asks for (None: it is neither); fails where its program would refuse."""
    if "--" in command:  # ray job submit ... --
        command = command[command.index("--") + 1 :]
    script = next((i for i, word in enumerate(command) if re.search(r"\brecipes/\w+\.py$", word)), None)
    if "--help" in command:
        return None
    if script is not None:
        recipe = ROOT / "recipes" / Path(command[script]).name
        return cli(runpy.run_path(str(recipe))["config"], args=command[script + 1 :])
    return parse(command[1:]) if command[0] == "raytron" else None


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documentation_are_understood(path: Path):
    for command in commands(path):
        understood(command)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_the_documentation_lead_somewhere(path: Path):
    pictures = {"quickstart-loss.png"}  # made by a real run
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target and Path(target).name not in pictures:
            assert (path.parent / target).exists(), f"{path.name}: {target}"
