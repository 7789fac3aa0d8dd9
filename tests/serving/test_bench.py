"""The load generator: its arithmetic on made-up requests, and a run against a live server."""

import asyncio
import itertools
import json
import math

import pytest

from raytron.cli import main
from raytron.serving.bench import Load, Measured, arrivals, measure, summary


def made(*arrivals: tuple[float, int], sent: float = 0.0, **fields) -> Measured:
    return Measured(sent=sent, arrivals=list(arrivals), **fields)


def test_a_chunk_of_several_tokens_is_several_gaps():
    one = made((1.0, 1), (1.3, 4), (1.4, 5))
    assert one.gaps() == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert (one.ttft, one.e2e, one.tpot) == pytest.approx((1.0, 1.4, 0.1))


def test_all_tokens_at_once_have_no_time_per_token():
    assert math.isnan(made((1.0, 7)).tpot)


def test_the_figures():
    load = Load(rate=2.0)
    good = [made((k / 10, 1), (k / 10 + 1.0, 11), prompt_tokens=3) for k in range(1, 101)]
    found = summary(load, [*good, Measured(error="gone")], ttft_ms=2000.0, tpot_ms=150.0)
    assert (found["requests"], found["failed"], found["errors"]) == (101, 1, ["gone"])
    assert found["seconds"] == pytest.approx(11.0)
    assert found["output_tokens_per_s"] == pytest.approx(1100 / 11)
    assert found["ttft_ms"]["p50"] == pytest.approx(5050)
    assert found["ttft_ms"]["p99"] == pytest.approx(9901)
    assert found["tpot_ms"] == pytest.approx(dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), 100.0))
    assert found["goodput_requests_per_s"] == pytest.approx(20 / 11)
    json.dumps(found)


def testarrivals_are_poisson_and_repeat():
    due = arrivals(Load(requests=20_000, rate=50.0))
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)
    assert due == arrivals(Load(requests=20_000, rate=50.0))
    assert set(arrivals(Load(requests=5))) == {0.0}


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_live_server_is_measured(live, endpoint):
    load = Load(url=f"{live.url}/v1", endpoint=endpoint, requests=20, rate=200.0, input_tokens=12, output_tokens=15)
    found = asyncio.run(measure(load))
    assert [one.error for one in found] == [None] * 20
    assert all(one.tokens == 15 and len(one.gaps()) == 15 - one.arrivals[0][1] for one in found)
    assert all(0 < one.ttft <= one.e2e and one.sent >= one.due for one in found)


def test_the_command(live, tmp_path, capsys):
    out = tmp_path / "found.json"
    ask = ["bench", "serve", "--url", f"{live.url}/v1", "--requests", "8", "--output-tokens", "5"]
    main([*ask, "--vocabulary", "250", "--input-tokens", "20", "--shared-tokens", "10", "--output", str(out)])
    assert "TTFT" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["failed"], found["output_tokens_per_s"] > 0) == (0, True)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        main([*ask, "--vocabulary", "250000"])
    with pytest.raises(ValueError, match="names no model"):
        main([*ask[:2], "--url", "http://127.0.0.1:9/v1"])
