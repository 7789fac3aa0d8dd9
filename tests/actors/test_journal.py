"""What happened to a run is on disk, whatever becomes of its driver, and can be told in words."""

from __future__ import annotations

from pathlib import Path

from raytron.actors.journal import SHOWN, Journal, Past, past, read_journal
from raytron.actors.live import describe, told


def test_events_survive_a_torn_last_line_and_another_driver(tmp_path: Path):
    path = tmp_path / "run" / "journal.jsonl"
    Journal(path).note("fault", what="rank 1 died")
    with path.open("a") as file:
        file.write('{"time": 1.0, "event": "reco')
    again = Journal(path)
    assert [event["event"] for event in again.recent] == ["fault"]
    again.note("recovered", mesh=[2, 1, 1, 1])
    assert [event["event"] for event in read_journal(path)] == ["fault", "recovered"]
    assert read_journal(tmp_path / "none") == []


SETUP = {"num_workers": [2, 4], "tp": 1, "pp": 1}
BEGAN = {"event": "began", "time": 1.0, "setup": SETUP}
ENDED = {"event": "ended", "time": 9.0}


def granted(at_s: float, refused: str | None = None, **asked: int) -> dict:
    return {"event": "request", "time": at_s, "asked": asked, "refused": refused}


def counted(count: int) -> dict:
    return {"event": "fault", "time": 5.0, "count": count}


def test_a_driver_goes_on_with_the_failures_and_wishes_of_one_that_died():
    asked = [granted(2.0, tp=2), granted(3.0, num_workers=2), granted(4.0, refused="too few", num_workers=1)]
    found = past([BEGAN, *asked, counted(1), counted(2)], SETUP)
    assert found == Past({"num_workers": 2, "tp": 2, "pp": None, "at_s": 3.0}, failures=2, interrupted=True)
    assert past([BEGAN, *asked, BEGAN, counted(3), BEGAN], SETUP) == Past(found.wish, 3, True)
    assert past([], SETUP) == Past()


def test_who_asks_for_a_shape_asks_for_all_of_it():
    wish = past([BEGAN, granted(2.0, tp=2), granted(3.0, num_workers=2), granted(4.0, pp=2)], SETUP).wish
    assert wish == {"num_workers": None, "tp": None, "pp": 2, "at_s": 4.0}


def test_the_end_of_a_run_ends_its_failures_and_another_configuration_its_wishes():
    before = [BEGAN, granted(2.0, num_workers=2), counted(2), ENDED]
    assert past(before, SETUP) == Past({"num_workers": 2, "tp": None, "pp": None, "at_s": 2.0})
    other = {**SETUP, "tp": 2}
    assert past(before, other) == Past()
    assert past([*before, {**BEGAN, "setup": other}, ENDED, BEGAN], SETUP) == Past(interrupted=True)


def test_a_wish_for_engines_is_taken_over():
    setup = {"engines": [1, 4]}
    asked = {"event": "request", "asked": {"engines": 2}, "refused": None, "time": 5.0}
    assert past([{"event": "began", "setup": setup}, asked], setup).wish == {"engines": 2, "at_s": 5.0}


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
