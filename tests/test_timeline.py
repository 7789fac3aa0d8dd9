"""The timeline: what was recorded is what is read, drawn and summed up; the file is Chrome's format in any case."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raytron.metrics import Span, Timeline, read_lanes, read_timeline, shares, timeline_page, timeline_png


def names(spans: list[Span]) -> list[tuple[str, str, int]]:
    return [(span.lane, span.name, span.start_of) for span in spans]


def record(path: Path, **options) -> None:
    with Timeline(path, lanes=["engine 0", "engine 1"], **options) as timeline:
        with timeline.span("trainer", "train", step=3):
            timeline.state("engine 0", "generating")
            timeline.state("engine 0", "generating")  # no news
        timeline.state("engine 1", None)  # nor this
        timeline.state("engine 0", "updating")
        with pytest.raises(KeyError), timeline.span("saves", "save"):
            raise KeyError
        timeline.state("engine 0", None)
        timeline.state("engine 1", "restarting")  # until the end


EVENTS = [
    ("trainer", "train"),
    ("engine 0", "generating"),
    ("saves", "save"),
    ("engine 0", "updating"),
    ("engine 1", "restarting"),
]


def test_what_happened_is_what_is_read(tmp_path):
    path = tmp_path / "run" / "timeline.json"
    record(path)
    spans = read_timeline(path)
    assert names(spans) == [(*event, 1) for event in EVENTS]
    assert read_lanes(path) == ["engine 0", "engine 1", "trainer", "saves"]
    train, generating, save, updating, restarting = spans
    assert train.args == {"step": 3}
    assert train.start <= generating.start <= train.start + train.seconds
    assert updating.start == pytest.approx(generating.start + generating.seconds, abs=2e-6)
    assert save.seconds <= updating.seconds
    assert updating.start + updating.seconds <= restarting.start + 2e-6


def test_the_file_is_an_array_of_trace_events(tmp_path):
    path = tmp_path / "timeline.json"
    record(path)
    events = json.loads(path.read_text().rstrip().removesuffix(",") + "]")
    assert {event["ph"] for event in events} == {"M", "X"}
    spans = [event for event in events if event["ph"] == "X"]
    assert all(isinstance(event[key], int) for event in spans for key in ("pid", "tid", "ts", "dur"))
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(threads.values())[:2] == ["engine 0", "engine 1"]
    assert [(threads[event["tid"]], event["name"]) for event in spans] == EVENTS


def test_starts_of_a_run_follow_each_other_and_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "timeline.json"
    record(path, keep=True)
    with path.open("a") as file:
        file.write('{"pid": 1, "name": "tr')
    record(path, keep=True)
    assert names(read_timeline(path)) == [(*event, start) for start in (1, 2) for event in EVENTS]
    record(path)
    assert names(read_timeline(path)) == [(*event, 1) for event in EVENTS]


SPANS = [
    Span("trainer", "train", 100.0, 2.0, 1, {"step": 1}),
    Span("engine 10", "generating", 102.0, 8.0, 1),
    Span("engine 2", "generating", 900.0, 5.0, 2),
    Span("trainer", "train", 905.0, 3.0, 2),
    Span("trainer", "score", 908.0, 2.0, 2),
]


def test_shares_are_of_the_time_that_the_run_ran():
    found = shares(SPANS)  # ten seconds, and ten more after a pause
    assert found == {
        "trainer": {"train": pytest.approx(5 / 20), "score": pytest.approx(2 / 20)},
        "engine 10": {"generating": pytest.approx(8 / 20)},
        "engine 2": {"generating": pytest.approx(5 / 20)},
    }
    assert shares([]) == {}


class Page(HTMLParser):
    """All start tags with their attributes, and the text of the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "data"}) and not self.data:
            self.data = data


def drawn(path: Path) -> dict:
    return json.loads(Page(path.read_text()).data)


def test_the_page_draws_every_span_where_it_was(tmp_path):
    timeline_page(SPANS, tmp_path / "timeline.html", "a run")
    data = drawn(tmp_path / "timeline.html")
    assert data["lanes"] == ["engine 2", "engine 10", "trainer"]
    found = [
        (data["lanes"][lane], data["names"][name], start, seconds, *more)
        for run in data["runs"]
        for lane, name, start, seconds, *more in run["spans"]
    ]
    assert found == [
        ("trainer", "train", 0.0, 2.0, {"step": 1}),
        ("engine 10", "generating", 2.0, 8.0),
        ("engine 2", "generating", 0.0, 5.0),
        ("trainer", "train", 5.0, 3.0),
        ("trainer", "score", 8.0, 2.0),
    ]
    assert [run["seconds"] for run in data["runs"]] == [10.0, 10.0]
    assert '<th scope="row">trainer</th><td>train 25.0%, score 10.0%</td>' in (tmp_path / "timeline.html").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["timeline.html"]


def test_the_page_has_engines_first_then_reward_models_and_lanes_where_nothing_happened(tmp_path):
    spans = [Span("reward model 1", "scoring", 100.0, 2.0), *SPANS, Span("reward model 0", "scoring", 100.0, 1.0)]
    timeline_page(spans, tmp_path / "timeline.html", lanes=["engine 3", "engine 2", "judge"])
    lanes = ["engine 2", "engine 3", "engine 10", "reward model 0", "reward model 1", "judge", "trainer"]
    assert drawn(tmp_path / "timeline.html")["lanes"] == lanes
    assert '<th scope="row">judge</th><td></td>' in (tmp_path / "timeline.html").read_text()


def test_the_page_needs_nothing_else_and_is_used_by_keyboard(tmp_path):
    timeline_page(SPANS, tmp_path / "timeline.html")
    text = (tmp_path / "timeline.html").read_text()
    assert not re.findall(r"(?:src|href)=|url\(|https?://|@import", text)
    (canvas,) = (attrs for tag, attrs in Page(text).tags if tag == "canvas")
    assert canvas["tabindex"] == "0"
    assert canvas["aria-label"]
    ids = {attrs["id"] for _, attrs in Page(text).tags if "id" in attrs}
    assert set(canvas["aria-describedby"].split()) <= ids
    assert set(re.findall(r'\$\("(\w+)"\)', text)) <= ids


@pytest.mark.parametrize("evil", ["</script><script>alert(1)</script>", "<img src=x>", '"&amp;'])
def test_what_is_named_cannot_leave_its_place(tmp_path, evil):
    timeline_page([Span(evil, evil, 0.0, 1.0, 1, {evil: evil})], tmp_path / "timeline.html", evil)
    tags = [tag for tag, _ in Page((tmp_path / "timeline.html").read_text()).tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert drawn(tmp_path / "timeline.html")["lanes"] == [evil]


def test_a_picture_is_drawn_of_whatever_there_is(tmp_path):
    timeline_png(SPANS, tmp_path / "timeline.png", "a run")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    timeline_png([], tmp_path / "none.png")
    timeline_page([], tmp_path / "none.html")
    assert drawn(tmp_path / "none.html")["runs"] == []
    assert not (tmp_path / "none.png").exists()
