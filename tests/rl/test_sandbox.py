"""The sandbox: programs run, and what they must not do is refused or ended; the machine stays as it was."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raytron.rl.environments import Generated, Prompt
from raytron.rl.rewards import Limits, PassesTests, SandboxError, judged, run_python
from raytron.rl.rewards import sandbox as sandbox_module
from raytron.rl.rewards.code import code_in
from raytron.rl.rewards.confine import syscall_filter

SMALL = Limits(cpu_s=2, wall_s=20.0, memory_mb=256, file_mb=1, output_kb=4)


def run(source: str, stdin: str = "", limits: Limits = SMALL):
    return asyncio.run(run_python(source, stdin, limits))


def test_a_program_runs():
    ran = run("import sys\nprint(sys.stdin.read().upper())\nprint('careful', file=sys.stderr)\nsys.exit(3)", "word")
    assert (ran.code, ran.output, ran.errors, ran.timed_out) == (3, "WORD\n", "careful\n", False)


def test_ordinary_programs_are_not_in_the_way_of_the_filter():
    source = """
import asyncio, collections, datetime, decimal, json, math, random, re, threading, tempfile, pathlib
import numpy
async def one(): return 1
assert asyncio.run(one()) == 1
thread = threading.Thread(target=print, args=("from a thread",)); thread.start(); thread.join()
with tempfile.NamedTemporaryFile() as file: file.write(b"x")
pathlib.Path("mine.txt").write_text("y"); assert open("mine.txt").read() == "y"
assert numpy.linalg.inv(numpy.eye(3) * 2)[0, 0] == 0.5
print(datetime.date(2024, 2, 29), random.Random(1).random() < 1)
"""
    ran = run(source, limits=Limits(memory_mb=2048))
    assert ran.errors == ""
    assert ran.output.splitlines()[0] == "from a thread"


def test_an_endless_loop_is_ended_by_its_processor_time():
    ran = run("while True: pass", limits=Limits(cpu_s=1, wall_s=60.0))
    assert ran.code < 0
    assert not ran.timed_out


def test_a_program_that_sleeps_is_ended_by_the_clock():
    ran = run(
        "import time, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(3600)",
        limits=Limits(wall_s=1.0),
    )
    assert ran.timed_out
    assert ran.code == -9


def test_memory_is_limited():
    ran = run("x = []\nwhile True: x.append(bytearray(10 << 20))")
    assert ran.code == 1
    assert "MemoryError" in ran.errors


def test_output_is_cut_and_files_are_limited():
    ran = run("print('x' * 100_000)")
    assert (ran.code, ran.output) == (0, "x" * 4096)
    ran = run("f = open('big', 'wb', buffering=0)\nwhile f.write(bytes(1 << 16)): pass")
    assert ran.code == 1
    assert "File too large" in ran.errors


REFUSED = {
    "a socket": "import socket; socket.socket()",
    "a name": "import socket; socket.create_connection(('example.com', 80), timeout=5)",
    "a udp socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "a unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "fork": "import os; os.fork()",
    "vfork and exec": "import subprocess; subprocess.run(['/bin/true'])",
    "posix_spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "clone": "import ctypes\nif ctypes.CDLL(None).syscall(CLONE, 17, 0, 0, 0, 0) == -1: raise PermissionError",
    "multiprocessing": "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start()",
    "a signal to its parent": "import os; os.kill(os.getppid(), 0)",
    "a signal to all": "import os, signal; os.kill(-1, 0)",
    "a parent's limits": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "higher limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "a namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == -1: raise PermissionError",
    "the shadow file": "open('/etc/shadow').read()",
    "its parent's environment": "import os; open(f'/proc/{os.getppid()}/environ').read()",
    "the project": "open(PROJECT).read()",
    "home": "import os; os.listdir(HOME)",
    "a file in /tmp": "open('/tmp/raytron-was-here', 'w')",
    "a file in /dev/shm": "open('/dev/shm/raytron-was-here', 'w')",
    "a file beside its interpreter": "import sys, pathlib; pathlib.Path(sys.prefix, 'was-here').write_text('x')",
    "a mode": "import os; os.chmod(PROJECT, 0o644)",
    "a time": "import os; os.utime(PROJECT)",
    "an owner": "import os; os.chown(PROJECT, os.getuid(), os.getgid())",
    "an attribute": "import os; os.setxattr(PROJECT, 'user.x', b'')",
    "a file's end": "import os; os.truncate(PROJECT, 0)",
    "a link": "import os; os.symlink('x', '/tmp/raytron-was-here')",
    "a way out by a link": "import os; os.symlink(PROJECT, 'link'); open('link').read()",
    "a hard link": "import os; os.link(PROJECT, 'link')",
    "shared memory": "import ctypes\nif ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1: raise PermissionError",
    "root": "import os; os.setuid(0); os.chroot('.')",
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused(what):
    source = REFUSED[what].replace("PROJECT", repr(__file__)).replace("HOME", repr(str(Path.home())))
    source = source.replace("CLONE", "56" if platform.machine() == "x86_64" else "220")
    ran = run(source + "\nprint('done')")
    assert ran.code == 1, (ran.output, ran.errors)
    assert "done" not in ran.output
    refusals = ("PermissionError", "not allowed to raise", "gaierror", "cross-device link")
    assert any(word in ran.errors for word in refusals), ran.errors


def test_a_bomb_of_threads_ends():
    ran = run(
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    assert ran.code == 1
    assert "can't start new thread" in ran.errors


def test_a_server_of_this_machine_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        ran = run(f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)")
        assert ran.code == 1
        with pytest.raises(BlockingIOError):
            server.accept()


def test_nothing_of_this_environment_is_passed_on(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "do not tell")
    ran = run("import os; print(sorted(os.environ.items()), os.listdir('.'))")
    assert "SECRET_KEY" not in ran.output
    assert "['main.py']" in ran.output


def test_file_descriptors_of_this_process_are_not_passed_on(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("do not tell")
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        ran = run("import os\nfor fd in range(3, 64):\n    try: print(fd, os.read(fd, 100))\n    except OSError: pass")
    assert ran.output == ""


def test_a_program_whose_judge_is_cancelled_ends():
    others = set(children())  # of tests before

    async def scenario():
        running = asyncio.ensure_future(run_python("import time\ntime.sleep(3600)", limits=Limits(wall_s=3600.0)))
        while not (started := set(children()) - others):
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return started

    for pid in asyncio.run(scenario()):
        assert not Path(f"/proc/{pid}").exists()


def children() -> list[str]:
    """Sandboxes that this process runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent, command = process.joinpath("stat").read_text().rpartition(")")[2].split()[1], process / "cmdline"
            found += [process.name] if int(parent) == os.getpid() and b"main.py" in command.read_bytes() else []
        except OSError:  # it ended meanwhile
            continue
    return found


def test_where_code_cannot_be_run_safely_it_is_not_run(monkeypatch):
    monkeypatch.setattr(Limits, "of_process", lambda limits: {"RLIMIT_NONSENSE": 1})
    with pytest.raises(SandboxError, match="RLIMIT_NONSENSE"):
        run("print('ran')")


@pytest.mark.parametrize("any_files", [False, True])
def test_without_landlock_it_is_run_only_where_any_file_may_be_written(any_files, tmp_path):
    """A kernel that doesn't know the system call is played by a number that none knows."""
    folder = Path(sandbox_module.__file__).parent
    order = {
        **sandbox_module._order(str(tmp_path), Limits(any_files=any_files)),
        "program": [sys.executable, "main.py"],
    }
    (tmp_path / "main.py").write_text(f"print(len(open({__file__!r}).read()) > 0)\nimport socket; socket.socket()")
    old = f"import json, sys; sys.path.insert(0, {str(folder)!r}); import confine; confine._LANDLOCK_CREATE = 9999"
    command = [sys.executable, "-I", "-c", f"{old}; confine.main(json.loads(sys.argv[1]), 1)", json.dumps(order)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ("Landlock" in done.stdout, done.returncode) == ((False, 1) if any_files else (True, 125))
    assert ("PermissionError" in done.stderr) == any_files


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_is_confined_too(tmp_path):
    """The interpreter of the tests may lie where other users can't read, so one that anybody can is used."""
    system = Path("/usr/bin/python3")
    if not system.exists():
        pytest.skip("this machine has no Python that every user may run")
    confine = tmp_path / "confine.py"
    confine.write_bytes(Path(sandbox_module.__file__).with_name("confine.py").read_bytes())
    (tmp_path / "main.py").write_text(
        "import os, socket\nprint(os.getuid())\nfor risky in (socket.socket, os.fork):\n    try: risky()\n"
        "    except PermissionError: print('refused')\n"
    )
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    order = {
        "program": [str(system), "-I", "main.py"],
        "env": {},
        "readable": ["/usr", "/lib", "/lib64", "/etc/ld.so.cache"],
        "writable": [str(tmp_path)],
        "any_files": False,
        "limits": SMALL.of_process(),
    }
    done = subprocess.run(
        [str(system), "-I", "-S", str(confine), json.dumps(order), "2"],
        cwd=tmp_path,
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("65534\nrefused\nrefused\n", "")


def worth(reward, text, tests):
    return asyncio.run(reward(Prompt(0, (), answer=tests), Generated((), (), (), text=text)))


DOUBLE = "Here it is:\n```python\nprint(2 * int(input()))\n```\n"
PAIRS = (("3", "6"), ("-1", "-2"), ("0", "0"))


def test_programs_that_print():
    reward = PassesTests(SMALL)
    assert worth(reward, DOUBLE, PAIRS) == 1.0
    assert worth(reward, DOUBLE, (*PAIRS, ("1", "3"))) == 0.0
    assert worth(PassesTests(SMALL, partial=True), DOUBLE, (*PAIRS, ("1", "3"))) == 0.75
    assert worth(reward, "print(", PAIRS) == 0.0
    assert worth(reward, "while True: pass", PAIRS[:1]) == 0.0
    with pytest.raises(ValueError, match="no tests"):
        worth(reward, DOUBLE, ())


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("def f(x): return 2 * x", 1.0),
        ("def f(x): return x", 0.0),
        ("def g(x): return 2 * x", 0.0),
        ("import sys; sys.exit(0)", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("def f(x): return 2 * x\nprint('no newline', end='')", 1.0),
        ("def f(x):", 0.0),
    ],
)
def test_programs_that_are_asserted(source, right):
    assert worth(PassesTests(SMALL), source, "assert f(3) == 6\nassert f(0) == 0") == right


def test_a_machine_that_cannot_run_code_gives_no_verdict(monkeypatch):
    monkeypatch.setattr(Limits, "of_process", lambda limits: {"RLIMIT_NONSENSE": 1})
    verdict = worth(judged(PassesTests(SMALL)), DOUBLE, PAIRS)
    assert verdict.reward is None
    assert "SandboxError" in verdict.reason


def test_the_last_block_is_the_program():
    assert code_in("```py\na\n```\nor\n```python\nb\n```") == "b\n"
    assert code_in("print(1)") == "print(1)"


@pytest.mark.parametrize("limits", [{"cpu_s": 0}, {"wall_s": -1.0}, {"memory_mb": 0}])
def test_limits_are_positive(limits):
    with pytest.raises(ValueError, match="must be positive"):
        Limits(**limits)


def test_a_filter_for_another_machine_is_refused():
    assert len(syscall_filter("x86_64", 1)) < 4096
    assert len(syscall_filter("aarch64", 1)) < 4096
    with pytest.raises(OSError, match="riscv64"):
        syscall_filter("riscv64", 1)
