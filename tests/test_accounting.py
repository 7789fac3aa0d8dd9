"""A journal as stretches of time: they add up to all of it, whatever the journal says."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.metrics import goodput
from raytron.metrics.accounting import KINDS, PARTS

ZERO = 1_700_000_000.0
NAMES = [
    "began",
    "started",
    "fault",
    "decided",
    "recovered",
    "rewound",
    "resized",
    "regained",
    "failed",
    "saved",
    "ended",
]
SECONDS = st.floats(0, 100)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        **{f"{part}_s": SECONDS for part in PARTS},
        **dict.fromkeys(("since_s", "step_s", "recovery_s", "redone_s", "seconds", "useful_s"), SECONDS),
        "step": st.integers(0, 50),
        "action": st.sampled_from(["wait", "replace"]),
    },
)


@st.composite
def journals(draw) -> list[dict[str, Any]]:
    """Any events in any order; clocks may even go back a little."""
    now, events = ZERO, []
    for _ in range(draw(st.integers(0, 25))):
        now += draw(st.floats(-1, 60))
        events.append({"time": now, "event": draw(st.sampled_from(NAMES)), **draw(FIELDS)})
    return events


def extents(events: list[dict[str, Any]]) -> float:
    """Seconds from the first event of each start to its latest."""
    starts: list[list[float]] = []
    for event in events:
        if event["event"] == "began" or not starts:
            starts.append([])
        starts[-1].append(event["time"])
    return sum(max(times) - times[0] for times in starts)


@settings(max_examples=60, deadline=None)
@given(journals())
def test_every_second_is_of_one_kind(events):
    account = goodput(events)
    assert account.wall_s == pytest.approx(extents(events), abs=1e-3)
    assert all(seconds >= -1e-6 for seconds in account.seconds.values())
    assert account.seconds.keys() == KINDS.keys()
    assert 0 <= account.share <= 1 + 1e-9
    for stretch, after in pairwise(account.stretches):
        assert stretch.start_of != after.start_of or stretch.end == pytest.approx(after.start, abs=1e-5)
        assert stretch.seconds > 0
        assert 0 <= stretch.worth <= 1
    for incident in account.incidents:
        assert "useful" not in incident.lost
        assert all(seconds > 0 for seconds in incident.lost.values())


PARTS_S = {"survey_s": 0.25, "release_s": 0.25, "rendezvous_s": 0.5, "move_s": 0.75, "adopt_s": 0.25}


def run_with(*middle: dict[str, Any], last: dict[str, Any]) -> list[dict[str, Any]]:
    """A run that starts for 5 seconds, and what then happens to it."""
    begun = {"time": ZERO, "event": "began"}
    started = {"time": ZERO + 5, "event": "started", "step": 0, "useful_s": 0.0}
    return [begun, started, *({**event, "time": ZERO + event["time"]} for event in (*middle, last))]


def test_a_recovery_is_taken_apart():
    fault = {"time": 30.0, "event": "fault", "what": "rank 1", "useful_s": 20.0, "since_s": 4.0, "step_s": 1.0}
    waits = {"time": 30.5, "event": "decided", "action": "wait", "reason": "no room"}
    found = {"time": 40.5, "event": "decided", "action": "replace", "reason": "a node came"}
    done = {"time": 45.0, "event": "recovered", "useful_s": 20.0, "recovery_s": 15.0, "newcomers_s": 2.0, **PARTS_S}
    back = {"time": 45.0, "event": "regained", "seconds": 1.5, "useful_s": 21.5}
    account = goodput(
        run_with(fault, waits, found, done, back, last={"time": 60.0, "event": "ended", "useful_s": 36.0})
    )
    said = {kind: seconds for kind, seconds in account.seconds.items() if seconds > 1e-6}
    assert said == pytest.approx(
        {
            "start": 5.0,
            "useful": 20.0 + 1.5 + 14.5,
            "other": 1.0 + 0.5,
            "step": 1.0,
            "detect": 1.5 + 0.25,
            "release": 0.25,
            "wait": 15.0 - 4.0,
            "newcomers": 2.0,
            "rendezvous": 0.5,
            "move": 1.0,
        }
    )
    (incident,) = account.incidents
    assert (incident.kind, incident.causes, incident.reason) == ("recovered", ("rank 1",), "a node came")
    assert sum(incident.lost.values()) == pytest.approx(15.0 + 4.0 - 1.5)


def test_what_is_done_again_after_a_checkpoint_is_lost():
    fault = {"time": 20.0, "event": "fault", "useful_s": 15.0}
    back = {"time": 21.0, "event": "rewound", "useful_s": 9.0, "redone_s": 6.0, "recovery_s": 1.0, "load_s": 1.0}
    account = goodput(run_with(fault, back, last={"time": 31.0, "event": "ended", "useful_s": 19.0}))
    assert account.seconds["useful"] == pytest.approx(19.0)
    assert account.seconds["redone"] == pytest.approx(6.0)
    assert account.seconds["load"] == pytest.approx(1.0)


def test_actors_that_are_started_again_cost_until_they_step():
    failed = {"time": 20.0, "event": "failed", "what": "no room", "useful_s": 15.0, "since_s": 0.5, "step_s": 1.0}
    again = {"time": 32.0, "event": "started", "step": 8, "useful_s": 8.0, "redone_s": 7.0}
    account = goodput(run_with(failed, again, last={"time": 33.0, "event": "ended", "useful_s": 9.0}))
    assert account.seconds["start"] == pytest.approx(5.0 + 12.0)
    assert account.seconds["useful"] == pytest.approx(14.5 - 7.0 + 1.0)
    assert [(one.kind, one.causes) for one in account.incidents] == [("restarted", ("no room",))]


def test_a_driver_that_was_killed_loses_what_its_successor_does_again():
    first = run_with(last={"time": 25.0, "event": "saved", "step": 20, "useful_s": 20.0})
    begun = {"time": ZERO + 1000, "event": "began"}
    started = {"time": ZERO + 1002, "event": "started", "step": 15, "useful_s": 0.0}
    ended = {"time": ZERO + 1012, "event": "ended", "step": 25, "useful_s": 10.0}
    account = goodput([*first, begun, started, ended])
    assert account.wall_s == pytest.approx(25.0 + 12.0)  # nobody ran it in between
    assert account.seconds["redone"] == pytest.approx(5.0)
    assert account.seconds["useful"] == pytest.approx(25.0)


def test_a_change_of_size_costs_what_it_took():
    resized = {"time": 20.0, "event": "resized", "useful_s": 13.0, "rendezvous_s": 0.5, "move_s": 1.0, "adopt_s": 0.25}
    account = goodput(run_with(resized, last={"time": 20.0, "event": "ended", "useful_s": 13.0}))
    assert [(one.kind, sum(one.lost.values())) for one in account.incidents] == [("resized", pytest.approx(1.75))]
    assert account.seconds["useful"] == pytest.approx(13.0)
