"""The parts of the benchmarks that decide what a number means: ratios, who is busy, order of measurement, the page."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "_common.py"
spec = importlib.util.spec_from_file_location("benchmarks_common", FILE)
common = importlib.util.module_from_spec(spec)
spec.loader.exec_module(common)


@pytest.mark.parametrize(
    ("ours", "peer", "higher_is_better", "ratio"),
    [(200.0, 100.0, True, 2.0), (200.0, 100.0, False, 0.5), (1.0, 3.0, False, 3.0)],
)
def test_a_ratio_above_one_means_ours_is_better(capsys, ours, peer, higher_is_better, ratio):
    row = common.emit("b", "c", ours, peer, "them", unit="s", higher_is_better=higher_is_better, details={"rounds": 3})
    printed = json.loads(capsys.readouterr().out)
    assert printed == row
    assert list(row) == ["benchmark", "case", "ours", "peer", "peer_name", "ratio", "unit", "details"]
    assert row["ratio"] == ratio


def test_a_row_without_a_target_has_no_ratio():
    assert "peer" not in common.emit("b", "c", 1.0, unit="s")
    informative = common.emit("b", "c", 1.0, 2.0, "them", unit="s", for_information=True)
    assert informative["peer"] == 2.0
    assert "ratio" not in informative


def test_a_case_is_one_line(capsys):
    common.emit("b", "several\nlines", 1.0, unit="s", details={"text": "a\nb"})
    assert capsys.readouterr().out.count("\n") == 1


def test_cases_take_turns_and_every_other_round_goes_backwards():
    taken = []
    count = itertools.count(1)

    def case(name):
        def measure():
            taken.append(name)
            return float(next(count))

        return measure

    samples = common.interleave({name: case(name) for name in "abc"}, rounds=3)
    assert "".join(taken) == "abccbaabc"
    assert samples["a"].values == (1.0, 6.0, 7.0)
    assert samples["a"].median == 6.0


def test_spread_is_relative_and_ignores_outliers():
    assert common.Samples((2.0,)).spread == 0.0
    assert common.Samples((1.0, 1.0, 1.0, 1.0, 50.0)).spread == 0.0
    assert common.Samples((9.0, 10.0, 11.0)).spread == pytest.approx(0.05)


def test_seconds_counts_every_call():
    calls = []
    assert common.seconds(lambda: calls.append(1), repeat=7)() >= 0
    assert len(calls) == 7


def test_busy_ticks_leave_idle_and_waiting_for_disk_out():
    assert common.busy_ticks("cpu  1 2 4 1000 2000 8 16 32 64 128\ncpu0 1 1 1 1 1 1 1 1 1 1\n") == 63


def stat(pid: int, parent: int, *ticks: int, name: str = "python") -> str:
    return f"{pid} ({name}) S {parent} " + " ".join(["0"] * 9 + [str(tick) for tick in ticks] + ["20", "0", "1"])


def test_own_work_is_that_of_the_whole_tree_below():
    processes = {
        1: stat(1, 0, 900, 900, 0, 0),
        10: stat(10, 1, 1, 2, 4, 8),
        11: stat(11, 10, 16, 0, 0, 0, name="a (strange) name 3 4"),
        12: stat(12, 11, 0, 32, 0, 0),
        20: stat(20, 1, 500, 500, 0, 0),
    }
    assert common.tree_ticks(processes, 10) == 63


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_own_work_is_not_counted_as_others():
    assert common._own_ticks() > 0
    assert common.others_cpu(0.0) >= 0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_work_of_a_child_belongs_to_the_tree():
    before = common._own_ticks()
    code = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert common._own_ticks() - before >= 0.2 * os.sysconf("SC_CLK_TCK") * 0.9


def readings(*values: float):
    """Cores used by others, one value a measurement, each taking three seconds of a clock that only this moves."""
    now = [0.0]
    left = list(values)

    def measure() -> float:
        now[0] += 3.0
        return left.pop(0) if len(left) > 1 else left[0]

    return {"measure": measure, "clock": lambda: now[0]}


def test_a_quiet_machine_is_used_at_once(capsys):
    assert common.wait_until_quiet(**readings(0.0)) == 0.0
    assert capsys.readouterr().err == ""


def test_a_busy_machine_is_waited_for(capsys):
    assert common.wait_until_quiet(**readings(99.0, 99.0, 0.0)) == 0.0
    assert capsys.readouterr().err.count("waiting") == 2


def test_a_machine_that_stays_busy_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        common.wait_until_quiet(**readings(99.0))
    assert refused.value.code == common.BUSY
    lines = capsys.readouterr().err.splitlines()
    assert "--force" in lines[-1]
    assert len(lines) == 20  # sixty seconds of three each, the last of them a refusal


def test_force_measures_once_and_says_so(capsys):
    assert common.wait_until_quiet(force=True, **readings(99.0)) == 99.0
    assert "as asked" in capsys.readouterr().err


def test_a_system_that_does_not_tell_is_taken_as_quiet():
    unknown = common.wait_until_quiet(**readings(float("nan")))
    assert unknown != unknown


def test_arguments_common_and_further(monkeypatch):
    monkeypatch.setattr(common, "others_cpu", lambda: 0.0)
    arguments = common.parse("what it does", ["--quick", "--hidden-size", "64"], hidden_size=256, layers=4)
    assert (arguments.quick, arguments.force, arguments.output) == (True, False, None)
    assert (arguments.hidden_size, arguments.layers) == (64, 4)


def test_cpu_model_is_the_first_name():
    assert common.cpu_model("processor : 0\nmodel name\t: A CPU: fast\nmodel name\t: B\n") == "A CPU: fast"
    assert common.cpu_model("") == ""


def test_results_page_says_how_where_when_and_what(tmp_path):
    row = common.emit("b", "fp32 | eager", 12345.6, 10000.0, "peer", unit="tokens/s", details={"spread": 0.0123456})
    common.write_results(tmp_path / "results" / "b.md", [row, common.emit("b", "plain", 0.5, unit="s")], notes="Said.")
    page = (tmp_path / "results" / "b.md").read_text()
    assert page.startswith("# b\n")
    for fact in ("- command: `python ", "- commit: ", "- CPU: ", "- cores: ", "- memory: ", "- date: 2", "torch 2."):
        assert fact in page
    assert r"| fp32 \| eager | 12,346 | 10,000 | peer | tokens/s | 1.235 | spread 0.01235 |" in page
    assert "| plain | 0.5 |  |  | s |  |  |" in page
    assert page.endswith("Said.\n")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["b.md"]
