"""What `benchmarks/elastic_rl.py` says of a run: its windows, on a run that is made up, and its books."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from raytron.rl.buffer import to_line
from raytron.rl.types import Group

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    sys.path.insert(0, BENCHMARKS)
    try:
        yield importlib.import_module("elastic_rl")
    finally:
        sys.path.remove(BENCHMARKS)


def test_windows_hold_whole_steps_with_both_engines_only(benchmark: ModuleType):
    # Steps of a second; an engine is killed in the middle of step 5 and ready again in that of step 7, of two seconds.
    ends = [0, 1, 2, 3, 4, 6, 8, 10, 11, 12, 13]
    run = benchmark.Story(dict(enumerate(ends)))
    fault = benchmark.Fault(run, benchmark.Deed("killed", 4.5, 4.5, 4.5, 9.0), 3)
    assert (fault.before, fault.after) == (range(2, 5), range(8, 11))
    assert fault.meanwhile == [2, 2, 2]
    assert fault.recovered_s == 5.5
    assert fault.alone == []
    left = benchmark.Fault(run, benchmark.Deed("left", 3.5, 4.0, 8.5, 9.0), 3)
    assert left.alone == [2, 2]
    assert benchmark.rate(run, [fault.after]) == benchmark.PROMPTS * benchmark.GROUP


def test_what_nobody_did_to_the_engines_is_told(benchmark: ModuleType):
    deeds = [benchmark.Deed(what, 0, 0, 0, 0) for what in ("killed", "left")]
    events = [{"event": f"engine {event}"} for event in ("failed", "joined", "left", "joined")]
    assert benchmark.unasked([{"event": "began"}, *events], deeds) is None
    assert "'engine failed': 2" in benchmark.unasked([*events, {"event": "engine failed"}], deeds)


@pytest.mark.parametrize(
    ("groups", "stopped", "wrong"),
    [
        ([1, 0, 2, 3], False, None),
        ([1, 0, 2, 3, 5], True, None),
        ([1, 0, 2, 3, 5], False, "4 groups trained, 5 recorded"),
        ([1, 0, 2, 3, 5, 5], True, "a group was recorded twice"),
        ([1, 0, 3, 5], True, "4 groups trained, 4 recorded"),
    ],
)
def test_a_run_that_was_stopped_may_have_begun_another_step(benchmark, tmp_path: Path, groups, stopped, wrong):
    records = [*(Group(index, ()) for index in groups), (1, (0, 1)), (2, (2, 3))]
    (tmp_path / "rollouts.jsonl").write_bytes(b"".join(map(to_line, records)))
    found = benchmark.ledger(tmp_path, 2, 2, stopped)
    assert found is None if wrong is None else found.startswith(wrong)
