"""The timeline page in a real browser: it shows every lane, and does what it promises by pointer and by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from raytron.metrics import Span, timeline_page
from tests.browser import CHROMIUM, FLAGS, needed, sync_api

pytestmark = needed
LANES = ["engine 0", "engine 1", "reward model 0", "judge", "trainer", "push", "evaluation", "saves"]
BUSY = LANES[:-1]  # a second each, one after the other, in the newest of two starts of the run
SPANS = [
    Span("trainer", "train", 100.0, 2.0, 1),
    *(Span(lane, "works", 900.0 + at, 1.0, 2, {"step": at}) for at, lane in enumerate(BUSY)),
]
ROW, LEFT = 26, 110  # of the page's script


@pytest.fixture(scope="module")
def tab(tmp_path_factory) -> Iterator[Any]:
    """The page; an error on its console, or a request to elsewhere, fails the test."""
    folder = tmp_path_factory.mktemp("page")
    timeline_page(SPANS, folder / "timeline.html", "a run", LANES)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            tab = browser.new_page()
            tab.set_default_timeout(60_000)
            tab.address, tab.wrong = (folder / "timeline.html").as_uri(), []
            tab.on("request", lambda request: tab.wrong.append(request.url) if request.url != tab.address else None)
            tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
            tab.on("console", lambda message: tab.wrong.append(message.text) if message.type == "error" else None)
            yield tab
        finally:
            browser.close()


@pytest.fixture
def page(tab) -> Iterator[Any]:
    tab.goto(tab.address)
    yield tab
    assert tab.wrong == []


def spot(page, lane: str, second: float) -> tuple[float, float]:
    """Where a moment of a lane is inside the canvas, while the whole run is shown."""
    width = page.evaluate("canvas.clientWidth")
    return LEFT + second / len(BUSY) * (width - LEFT), LANES.index(lane) * ROW + ROW / 2


def point(page, lane: str, second: float) -> None:
    """Put the pointer there."""
    x, y = spot(page, lane, second)
    page.locator("#chart").hover(position={"x": x, "y": y})


def shown(page) -> tuple[float, float]:
    """First second and number of seconds."""
    return tuple(page.evaluate("[from, span]"))


def test_every_lane_is_shown_with_what_happened_on_it(page):
    assert page.locator("tbody th").all_text_contents() == LANES
    assert page.locator("tbody td").all_text_contents()[-1] == ""
    said = page.locator("#said")
    for at, lane in enumerate(BUSY):
        point(page, lane, at + 0.5)
        sync_api.expect(said).to_have_text(f"{lane}: works, 1.00 s, from {f'{at}.00 s' if at else '0.0 ms'}, step {at}")
        for second, drawn in ((at + 0.5, True), ((at + 3.5) % len(BUSY), False)):
            x, y = spot(page, lane, second)
            alpha = page.evaluate(f"pen.getImageData({x} * devicePixelRatio, {y} * devicePixelRatio, 1, 1).data[3]")
            assert (alpha == 255) == drawn
    point(page, "saves", 3.0)
    sync_api.expect(said).to_have_text("")


def test_it_is_zoomed_and_moved_by_keyboard(page):
    whole = shown(page)
    assert whole == (0.0, pytest.approx(len(BUSY)))
    page.locator("#chart").focus()
    page.keyboard.press("+")
    assert shown(page) == pytest.approx((whole[1] / 4, whole[1] / 2))
    page.keyboard.press("ArrowRight")
    assert shown(page) == pytest.approx((whole[1] * 0.35, whole[1] / 2))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("-")
    assert shown(page) == pytest.approx(whole)
    page.keyboard.press("-")  # there is no more than all of it
    assert shown(page) == pytest.approx(whole)
    page.keyboard.press("+")
    page.keyboard.press("0")
    assert shown(page) == pytest.approx(whole)


def test_lanes_and_their_spans_are_chosen_by_keyboard(page):
    said = page.locator("#said")
    page.locator("#chart").focus()
    for lane in LANES[1:]:
        page.keyboard.press("ArrowDown")
        sync_api.expect(said).to_have_text(lane)
    page.keyboard.press(".")
    sync_api.expect(said).to_have_text("saves: nothing")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("+")
    page.keyboard.press("+")
    page.keyboard.press(".")
    sync_api.expect(said).to_contain_text("evaluation: works")
    first, length = shown(page)
    assert first <= BUSY.index("evaluation") < first + length  # it was brought into view


def test_the_wheel_zooms_where_the_pointer_is_and_a_drag_moves(page):
    point(page, "trainer", 4.5)
    x, y = spot(page, "trainer", 4.5)
    under = f"at({x})"
    before = page.evaluate(under)
    page.mouse.wheel(0, -100)
    page.wait_for_function(f"span < {len(BUSY)}")
    assert page.evaluate(under) == pytest.approx(before, abs=0.05)
    first, length = shown(page)
    box = page.locator("#chart").bounding_box()
    page.mouse.down()
    page.mouse.move(box["x"] + x + 50, box["y"] + y)
    page.mouse.up()
    width = page.evaluate("canvas.clientWidth") - LEFT
    assert shown(page) == pytest.approx((max(0.0, first - 50 / width * length), length), abs=0.05)
    page.mouse.wheel(0, 1000)
    page.wait_for_function(f"span > {length}")


def test_another_start_of_the_run_is_chosen(page):
    choice = page.get_by_label("Start of the run")
    assert choice.locator("option").count() == 2
    choice.select_option("0")
    assert shown(page) == (0.0, pytest.approx(2.0))
    page.locator("#chart").hover(position={"x": spot(page, "trainer", 3.5)[0], "y": spot(page, "trainer", 0)[1]})
    sync_api.expect(page.locator("#said")).to_have_text("trainer: train, 2.00 s, from 0.0 ms")
