"""What happened to a run is on disk, whatever becomes of its driver, and can be told in words."""

from __future__ import annotations

from pathlib import Path

from raytron.actors.journal import SHOWN, Journal, read_journal
from raytron.actors.live import describe, told


def test_events_survive_a_torn_last_line_and_another_driver(tmp_path: Path):
    path = tmp_path / "run" / "journal.jsonl"
    Journal(path).note("fault", what="rank 1 died")
    with path.open("a") as file:
        file.write('{"time": 1.0, "event": "reco')
    again = Journal(path)
    assert [event["event"] for event in again.recent] == ["fault"]
    with path.open("a") as file:
        file.write("\n")
    again.note("recovered", mesh=[2, 1, 1, 1])
    assert [event["event"] for event in read_journal(path)] == ["fault", "recovered"]
    assert read_journal(tmp_path / "none") == []


def test_a_status_is_of_the_last_events(tmp_path: Path):
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(2 * SHOWN):
        journal.note("fault", step=step, what="rank 1 died")
    assert [event["step"] for event in journal.recent] == list(range(SHOWN, 2 * SHOWN))
    assert all("fault: rank 1 died step" in line for line in told(journal.recent))


def test_a_status_in_words():
    rank = {"rank": 0, "place": "actor-4", "host": "h", "node": "0123456789", "pid": 7}
    state = {
        "run": "r",
        "step": 5,
        "steps": 10,
        "wall_s": 60.0,
        "goodput": 0.95,
        "recoveries": 1,
        "mesh": [1, 1, 1, 1],
        "generation": 2,
        "ranks": [rank, {**rank, "rank": None, "place": "actor-5"}],
        "events": [],
    }
    text = describe(state)
    assert "r: step 5 of 10" in text
    assert "goodput 95.0 %, 1 recoveries" in text
    assert "rank 0   actor-4    h node 01234567 pid 7" in text
    assert "spare    actor-5" in text
    assert describe({"run": "r"}) == "r: starting"
