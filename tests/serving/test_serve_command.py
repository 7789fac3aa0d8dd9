"""`raytron serve` as a process: it says how to ask it, and finishes what runs before it leaves."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.serving.clients import Flood, body, until
from tests.serving.conftest import save_model
from tests.test_recipes import environment, session_of

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


class Command:
    """A running `raytron serve`, in a session of its own. `url` is where it listens."""

    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "raytron.cli", "serve", *args, "--port", "0", "--kv-cache-mb", "16"]
        env = environment(PYTHONPATH=str(ROOT))
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.said = ""
        while "ask with" not in self.said:
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line
        self.url = re.search(r"at (http://127\.0\.0\.1:\d+)", self.said).group(1)

    def end(self) -> None:
        self.process.kill()
        for pid in session_of(self.process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs_refuses_what_comes_and_leaves_nothing_behind(tmp_path, number):
    command = Command(f"mine={save_model(tmp_path / 'model')}", "--dtype", "fp32")
    try:

        async def scenario() -> list:
            load = asyncio.create_task(Flood(command).send([body("mine", f"x{i}", 450) for i in range(40)]))
            await asyncio.to_thread(until, lambda: running(command) >= 10, "at work")
            if number == signal.SIGINT:
                os.killpg(command.process.pid, number)  # as a terminal does: to everyone of the group
            else:
                command.process.send_signal(number)
            return await load

        answers = asyncio.run(scenario())
        assert [status for status, _, _ in answers] == [200] * 40
        assert all(a["usage"]["completion_tokens"] == 450 for _, _, a in answers)
        assert command.process.wait(120) == 0, command.process.stdout.read()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{command.url}/health")
        until(lambda: not session_of(command.process.pid), "no process left")
        assert "Traceback" not in command.process.stdout.read()
    finally:
        command.end()


def running(command: Command) -> int:
    return httpx.get(f"{command.url}/admin/stats", timeout=30).json()["models"]["mine"][0]["running"]


def test_a_taken_port_and_a_layout_that_does_not_fit_are_one_line(tmp_path):
    path = save_model(tmp_path / "model")
    for args, said in ((["--tp", "3"], "3"), (["--host", "192.0.2.77"], "192.0.2.77")):
        command = [sys.executable, "-m", "raytron.cli", "serve", path, "--port", "0", *args]
        done = subprocess.run(command, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
