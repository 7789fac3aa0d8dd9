"""The page of a run in a real browser: it says all that happened, at any width, and asks nobody for anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytron.metrics import status_page
from tests.browser import CHROMIUM, FLAGS, needed, sync_api
from tests.test_accounting import PARTS_S, ZERO

pytestmark = needed
EVIL = "</title><script>document.title = 'broken'</script><img src=x onerror=alert(1)>"


def seated(at: float, generation: int, places: list[str], spares: list[str]) -> dict[str, Any]:
    """Two ranks on each node."""
    nodes = [["a1" * 28, "host-one"], ["b2" * 28, EVIL]]
    ranks = [[place, rank // 2] for rank, place in enumerate(places)]
    rest = {"nodes": nodes, "ranks": ranks, "spares": [[place, 1] for place in spares]}
    return {"time": ZERO + at, "event": "seated", "generation": generation, "mesh": [len(places), 1, 1, 1], **rest}


FOUR = ["actor-0", "actor-1", "actor-2", "actor-3"]
CAME = [
    {"rank": 0, "place": "actor-0", "from": [["own", "actor-0", 9_000_000]]},
    {"rank": 3, "place": "actor-4", "from": [["replica", "actor-2", 6_000_000], ["twin", "actor-1", 3_000_000]]},
]
BYTES = {"bytes_moved": 9_000_000, "bytes_local": 9_000_000, "sources": CAME}
EVENTS = [
    {"time": ZERO, "event": "began", "steps": 100, "run": EVIL},
    seated(2, 0, FOUR, ["actor-4"]),
    {"time": ZERO + 5, "event": "started", "step": 0, "useful_s": 0.0},
    {
        "time": ZERO + 30,
        "event": "fault",
        "what": f"rank 3 died {EVIL}",
        "since_s": 2.0,
        "step_s": 1.0,
        "useful_s": 22.0,
    },
    {"time": ZERO + 30, "event": "decided", "action": "replace", "reason": f"1 seats go to warm places {EVIL}"},
    {
        "time": ZERO + 33,
        "event": "recovered",
        "mesh": [4, 1, 1, 1],
        "recovery_s": 3.0,
        "useful_s": 22.0,
        **PARTS_S,
        **BYTES,
    },
    seated(33, 1, [*FOUR[:3], "actor-4"], []),
    {"time": ZERO + 50, "event": "resized", "mesh": [2, 1, 1, 1], "useful_s": 36.0, **PARTS_S, **BYTES},
    seated(50, 2, FOUR[:2], []),
    {"time": ZERO + 60, "event": "ended", "step": 40, "useful_s": 45.0, "why": ""},
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(params=[("light", 1200), ("dark", 360)], ids=["desk", "phone"])
def page(request, browser, tmp_path: Path) -> Iterator[Any]:
    """The page; a request to elsewhere, or an error, fails the test."""
    scheme, width = request.param
    status_page(EVENTS, tmp_path / "status.html", EVIL)
    tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    wrong: list[str] = []
    address = (tmp_path / "status.html").as_uri()
    tab.on("request", lambda asked: wrong.append(asked.url) if asked.url.partition("#")[0] != address else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(address)
    yield tab
    tab.close()
    assert wrong == []


def test_all_is_said_in_words_and_nothing_said_is_markup(page):
    assert page.title() == f"{EVIL}: how it fared"
    assert page.locator("script, img").count() == 0
    facts = dict(zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents(), strict=True))
    assert facts["goodput"] == f"{45 / 60:.1%}"
    assert (facts["ranks"], facts["nodes"], facts["generation"]) == ("2", "2", "2")
    assert (facts["recoveries"], facts["changes of size"], facts["step"]) == ("1", "1", "40 of 100")
    headings = page.get_by_role("heading", level=2).all_text_contents()
    assert headings == [
        "Where the time went",
        "Timeline",
        "Who sits where",
        "Faults, recoveries and changes",
        "Generations",
    ]
    where = page.get_by_role("table", name="Where the time went")
    shares = [float(text.rstrip("%")) for text in where.locator("td:last-child").all_text_contents()]
    assert sum(shares) == pytest.approx(100, abs=0.1)
    assert page.get_by_role("table", name="How often the ranks have met").get_by_role("row").count() == 4


def test_an_incident_opens_by_keyboard_and_says_where_bytes_came_from(page):
    incident = page.locator("details", has_text="recovered in place")
    incident.locator("summary").focus()
    page.keyboard.press("Enter")
    table = incident.get_by_role("table", name=re.compile("Where each shard came from"))
    sync_api.expect(table).to_be_visible()
    assert table.locator("thead th").all_text_contents() == ["rank", "own memory", "twin", "replica"]
    assert table.locator("tbody tr").nth(1).locator("td").all_text_contents() == [
        "–",
        "3 MB from actor-1",
        "6 MB from actor-2",
    ]


def test_a_mark_of_the_timeline_leads_to_what_happened_there(page):
    marks = page.get_by_role("navigation").get_by_role("link")
    assert marks.count() == 2
    marks.first.focus()
    page.keyboard.press("Enter")
    target = page.url.partition("#")[2]
    assert page.locator(f"#{target} summary").text_content().startswith(("0", "1", "2"))
    sync_api.expect(page.locator(f"#{target}")).to_be_in_viewport()


def test_pictures_have_names_and_fit_any_width(page):
    pictures = page.get_by_role("img")
    assert pictures.count() == 2
    for picture in pictures.all():
        names = picture.get_attribute("aria-labelledby").split()
        assert all(page.locator(f"#{name}").text_content() for name in names)
        assert picture.bounding_box()["width"] > 200
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert len(page.screenshot(full_page=True)) > 10_000


def test_text_stands_out_from_what_is_behind_it(page):
    """WCAG's contrast of at least 4.5 for text, 3 for the parts of a picture."""
    ratio = """(ink, paper) => {
      const probe = document.body.appendChild(document.createElement("i"));
      const light = name => {
        probe.style.color = `var(${name})`;
        const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3)
          .map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
      };
      const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
      probe.remove();
      return (a + .05) / (b + .05);
    }"""
    for ink, least in {"--text": 7, "--soft": 4.5, "--accent": 4.5, "--useful": 3, "--detect": 3, "--wait": 3}.items():
        for paper in ("--page", "--card"):
            assert page.evaluate(f"({ratio})('{ink}', '{paper}')") >= least, (ink, paper)


def test_a_run_of_which_nothing_is_known_has_a_page_too(tmp_path: Path):
    status_page([], tmp_path / "status.html", "nobody")
    assert "Nothing is known" in (tmp_path / "status.html").read_text()
    status_page([*EVENTS[:3], {"time": ZERO + 9, "event": "now", "useful_s": 3.0}], tmp_path / "live.html", "r", 5)
    text = (tmp_path / "live.html").read_text()
    assert "Alive at" in text
    assert '<meta http-equiv="refresh" content="5">' in text
