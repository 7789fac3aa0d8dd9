"""The chat page in a real browser, headless: type, stream, stop, see an error; by keyboard, and on a phone."""

import re

import httpx
import pytest

from raytron.config import ServeConfig
from tests.browser import CHROMIUM, FLAGS, needed, sync_api
from tests.serving.conftest import save_model, serving

pytestmark = needed


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model without a template; what it says is nonsense, and long enough to be stopped."""
    path = save_model(tmp_path_factory.mktemp("page") / "model", template=None)
    with serving(path, max_model_len=512) as server:
        yield server


@pytest.fixture
def page(tmp_path, served):
    """The page as just opened. Any request to elsewhere, and any error on its console, fails the test."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        try:
            tab, wrong = browser.pages[0], []
            tab.on("request", lambda request: wrong.append(request.url) if "127.0.0.1" not in request.url else None)
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            tab.set_default_timeout(60_000)
            tab.goto(served.url)
            sync_api.expect(tab.get_by_label("Model")).to_have_value("tiny")
            yield tab
            outside = [one for one in wrong if not one.startswith("data:")]
            assert not outside
        finally:
            browser.close()


def set_up(page, **settings) -> None:
    """Fill the settings in, by their labels."""
    page.get_by_role("button", name="Settings").click()
    for label, value in settings.items():
        page.get_by_label(label.replace("_", " ")).fill(value)
    page.get_by_role("button", name="Done").click()


def ask(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def test_an_answer_streams_and_its_speed_is_shown(page, served):
    set_up(page, Temperature="0", Most_tokens="60")
    ask(page, "hello")
    expect = sync_api.expect
    expect(page.locator(".user .text")).to_have_text("hello")
    expect(page.locator(".assistant .under")).to_contain_text(re.compile(r"\d+ tokens · [\d.]+ tokens/s"))
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    prompt = "User: hello\nAssistant:"
    told = served.client().completions.create(
        model="tiny", prompt=prompt, max_tokens=60, temperature=0, top_p=0.95, stop=["\nUser:"]
    )
    assert page.locator(".assistant .text").text_content() == told.choices[0].text
    expect(page.get_by_label("Message")).to_be_focused()


def test_an_answer_can_be_stopped_with_escape(page, served):
    slow_down(served, page)
    set_up(page, Most_tokens="400")
    ask(page, "tell me everything")
    sync_api.expect(page.locator(".assistant .under")).to_contain_text("tokens/s")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator(".assistant .under")).to_contain_text("stopped")
    sync_api.expect(page.get_by_role("button", name="Send")).to_be_visible()
    for _ in range(1000):
        stats = httpx.get(f"{served.url}/admin/stats").json()["models"]["tiny"][0]
        if stats["running"] == stats["kv_usage"] == 0:
            break
    assert (stats["running"], stats["kv_usage"]) == (0, 0)


def slow_down(served, page) -> None:
    """Let the network take its time, so that there is something left to stop."""
    devtools = page.context.new_cdp_session(page)
    rates = {"offline": False, "latency": 0, "downloadThroughput": 3000, "uploadThroughput": -1}
    devtools.send("Network.enable")
    devtools.send("Network.emulateNetworkConditions", rates)


def test_an_error_is_shown_and_tried_again(page):
    set_up(page, Most_tokens="100000")
    ask(page, "hello")
    alert = page.get_by_role("alert")
    sync_api.expect(alert).to_contain_text("context is 512 tokens")
    set_up(page, Most_tokens="5")
    alert.get_by_role("button", name="Try again").click()
    sync_api.expect(page.locator(".assistant .under")).to_contain_text("5 tokens")
    assert page.get_by_role("alert").count() == 0


def test_what_was_said_is_remembered_until_a_new_chat(page):
    set_up(page, Temperature="0", Most_tokens="4", System_prompt="Be brief.")
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    for text in ("one", "two"):
        ask(page, text)
        sync_api.expect(page.get_by_role("button", name="Copy")).to_have_count(1 + (text == "two"))
    assert [m["role"] for m in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    ask(page, "three")
    sync_api.expect(page.get_by_role("button", name="Copy")).to_have_count(1)
    assert [m["role"] for m in bodies[2]["messages"]] == ["system", "user"]


def test_everything_is_reached_by_keyboard_and_has_a_name(page):
    page.keyboard.press("Escape")
    page.locator("body").focus()
    names = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        names.add(page.evaluate("document.activeElement.id"))
    assert {"model", "new", "open", "prompt"} <= names
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')]"
        ".filter(e => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.id)"
    )
    assert unnamed == []
    page.get_by_label("Message").fill("a")
    page.get_by_label("Message").press("Shift+Enter")
    assert page.get_by_label("Message").input_value() == "a\n"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(page, scheme):
    page.set_viewport_size({"width": 360, "height": 640})
    page.emulate_media(color_scheme=scheme)
    set_up(page, Most_tokens="100")
    ask(page, "x" * 300)
    sync_api.expect(page.get_by_role("button", name="Copy")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = page.get_by_role("button", name="Send").bounding_box()
    assert box["x"] + box["width"] <= 360
    assert box["y"] + box["height"] <= 640
    style = "getComputedStyle(document.body)"
    ink, paper = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
    assert contrast(ink, paper) > 7


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_a_key_is_asked_for_and_used(served):
    config = ServeConfig(port=0, api_keys=("secret",))
    with serving(served.path, config) as guarded, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            tab = browser.new_context(http_credentials={"username": "me", "password": "secret"}).new_page()
            tab.goto(guarded.url)
            tab.get_by_role("button", name="Settings").click()
            tab.get_by_label("API key").fill("wrong")
            tab.get_by_label("Most tokens").fill("5")
            tab.get_by_role("button", name="Done").click()
            ask(tab, "hello")
            sync_api.expect(tab.get_by_role("alert")).to_contain_text("the API key is wrong")
            tab.keyboard.press("Escape")
            tab.evaluate("document.getElementById('settings').open || document.getElementById('settings').showModal()")
            tab.get_by_label("API key").fill("secret")
            tab.get_by_role("button", name="Done").click()
            tab.get_by_role("button", name="Try again").click()
            sync_api.expect(tab.locator(".assistant .under")).to_contain_text("5 tokens")
        finally:
            browser.close()
