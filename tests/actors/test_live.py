"""What a status says in words, and whom chaos may hit."""

from __future__ import annotations

from raytron.actors import live

RANK = {"rank": 0, "place": "actor-0", "host": "one", "node": "0123456789", "pid": 7, "gpus": []}
ENGINES = [
    {"engine": 0, "state": "ready", "version": 5, "node": "fedcba9876", "host": "two", "pid": 8,
     "outstanding_tokens": 1234, "requests": 3},
    {"engine": 2, "state": "starting", "version": None, "outstanding_tokens": 0, "requests": 0},
]  # fmt: skip
STATE = {
    "run": "rl", "step": 5, "steps": 9, "wall_s": 60.0, "goodput": 0.5, "recoveries": 0, "generation": 0,
    "mesh": [1, 1, 1, 1], "ranks": [RANK], "engines": ENGINES, "events": [],
}  # fmt: skip


def test_a_status_tells_of_engines():
    lines = live.describe(STATE).splitlines()
    assert "  engine 0   ready    two node fedcba98 pid 8, version 5, 3 requests, 1,234 tokens at most" in lines
    assert "  engine 2   starting no seat yet, no weights yet, 0 requests, 0 tokens at most" in lines
    without = {key: value for key, value in STATE.items() if key != "engines"}
    assert "engine" not in live.describe(without)


def test_chaos_hits_ranks_and_engines_that_run():
    spare = {**RANK, "rank": None}
    assert [who for who, _ in live._victims({**STATE, "ranks": [RANK, spare]})] == ["rank 0", "engine 0"]
    assert live._victims({}) == []
