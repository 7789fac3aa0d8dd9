"""A run that is hurt, shrinks, grows and changes shape has the losses of one nobody disturbed, step for step."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from raytron.actors.journal import read_journal
from raytron.metrics import StepRecord, goodput, read_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent


def drill(folder: Path, name: str, deeds: list[dict], *numbers: int) -> list[StepRecord]:
    """Records of the steps of a run to which all this was done, see benchmarks/_drill.py."""
    rest = [str(folder), name, json.dumps(deeds), *map(str, numbers)]
    script(folder, name, str(ROOT / "benchmarks" / "_drill.py"), *rest)
    return [r for r in read_records(folder / name / "metrics.jsonl") if isinstance(r, StepRecord)]


def script(folder: Path, name: str, *command: str) -> None:
    """Run a script in a process of its own."""
    log = folder / f"{name}.log"
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    with log.open("a") as out:  # as the driver does
        code = subprocess.run(
            [sys.executable, *command], env=env, cwd=folder, stdout=out, stderr=subprocess.STDOUT, timeout=600
        ).returncode
    assert code == 0, log.read_text()


def events(folder: Path, name: str, *kinds: str) -> list[dict]:
    return [event for event in read_journal(folder / name / "journal.jsonl") if event["event"] in kinds]


def test_losses_are_those_of_the_quiet_run_whatever_happens_to_ranks_and_nodes(tmp_path):
    deeds = ["kill", "remove node", "add node", "reshape", "kill driver", "stop", "drain"]
    hurt = drill(tmp_path, "hurt", [{"what": deed, "chance": 0.0} for deed in deeds], 70)
    same_as_quiet(tmp_path, hurt)
    assert not events(tmp_path, "hurt", "rewound")  # every shard had a twin on the other node
    sizes = [4, *(math.prod(event["mesh"]) for event in events(tmp_path, "hurt", "recovered", "resized"))]
    assert min(sizes) == sizes[-1] == 2
    assert len(events(tmp_path, "hurt", "began")) == 2
    # The second driver knew of the wish for another shape.
    assert events(tmp_path, "hurt", "recovered", "resized")[-1]["mesh"] == [1, 1, 1, 2]
    assert any(before < after for before, after in pairwise(sizes))
    assert page_adds_up(tmp_path / "hurt")


def same_as_quiet(folder: Path, hurt: list[StepRecord]) -> None:
    quiet = drill(folder, "quiet", [], hurt[-1].step)
    assert [record.step for record in hurt] == list(range(1, len(hurt) + 1))  # nothing lost, nothing twice
    assert [record.consumed_samples for record in hurt] == [8 * record.step for record in hurt]
    assert [r.loss for r in hurt] == pytest.approx([r.loss for r in quiet[: len(hurt)]], rel=1e-9)


def test_losses_are_those_of_the_quiet_run_when_faults_come_while_bytes_are_moving(tmp_path):
    """In the recovery from a fault, in a change of size that was asked for, and by a rank that hangs."""
    pairs = [("kill", "kill"), ("resize", "kill"), ("kill", "stop")]
    deeds = [deed for first, second in pairs for deed in (
        {"what": first, "chance": 0.0}, {"what": second, "phase": "move", "hasty": True}
    )]  # fmt: skip
    hurt = drill(tmp_path, "hurt", deeds, 30)
    hit = re.findall(r"^(\w+) move, step", (tmp_path / "hurt.log").read_text(), re.MULTILINE)
    assert hit == [second for _, second in pairs]
    assert [event["what"].count("in reshape") for event in events(tmp_path, "hurt", "fault")] == [0, 1, 1, 0, 1]
    same_as_quiet(tmp_path, hurt)


@pytest.mark.parametrize(
    ("deeds", "events_"),
    [
        (["remove node"], ["recovered"]),
        (["freeze node"], ["recovered"]),
        (["resize", "freeze node"], ["resized", "rewound"]),  # both ranks sat there
    ],
    ids=["gone", "frozen", "frozen with all ranks"],
)
def test_a_node_that_ray_takes_for_alive_is_done_without(tmp_path, deeds, events_):
    """Ray would miss it in ten minutes; one that stands still takes connections, but nothing new is started there."""
    hurt = drill(tmp_path, "hurt", [{"what": deed, "chance": 0.0} for deed in deeds], 30, 600)
    kinds = ("recovered", "resized", "rewound")
    assert [event["event"] for event in events(tmp_path, "hurt", *kinds)] == events_
    assert "went with node" in events(tmp_path, "hurt", "decided")[-1]["reason"]
    same_as_quiet(tmp_path, hurt)


def page_adds_up(folder: Path) -> bool:
    """Whether the run left its page, and a journal in which every byte of a move has a source."""
    journal = read_journal(folder / "journal.jsonl")
    for event in journal:
        if event["event"] in ("recovered", "resized"):
            came = [source for row in event["sources"] for source in row["from"]]
            assert sum(count for kind, _, count in came if kind == "own") == event["bytes_local"]
            assert sum(count for kind, _, count in came if kind != "own") == event["bytes_moved"]
    account = goodput(journal)
    assert 0 < account.seconds["useful"] < account.wall_s <= journal[-1]["time"] - journal[0]["time"] + 1e-3
    return "</html>" in (folder / "status.html").read_text()


def test_a_run_grows_on_nodes_it_asked_for_and_gives_back_what_it_does_not_want(tmp_path):
    script(tmp_path, "scaled", "-m", "tests.autoscaled", str(tmp_path), "scaled")
    four, two, none = json.loads((tmp_path / "asked.json").read_text())
    assert (four, two, none) == ([{"CPU": 1.0}] * 4, [{"CPU": 1.0}] * 2, [])
    assert not events(tmp_path, "scaled", "fault", "failed")
    assert [math.prod(event["mesh"]) for event in events(tmp_path, "scaled", "resized")] == [4, 2]
