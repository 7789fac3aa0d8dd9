"""The page of transcripts: what was said is there, told apart and harmless; steps are replaced when a run resumes."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from raytron.rl.transcripts import add_transcripts
from raytron.rl.types import Group, Trajectory


def trajectory(reward: float | None = 1.0, **options) -> Trajectory:
    """Prompt 1 2, answer 3 4, observation 5, answer 6."""
    chosen = [False, False, True, True, False, True]
    versions = [-1, -1, 7, 7, -1, 9]
    return Trajectory([1, 2, 3, 4, 5, 6], chosen, [0.0] * 6, versions, reward, **options)


def decode(ids, special=False) -> str:
    assert special
    return " ".join(f"<t{i}>" for i in ids)


class Page(HTMLParser):
    """Text by the class of the innermost span, and all start tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "span":
            self.open.append(dict(attrs)["class"])

    def handle_endtag(self, tag):
        if tag == "span":
            self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))


def test_prompt_choices_and_observations_are_told_apart(tmp_path):
    page = tmp_path / "run" / "page.html"
    add_transcripts(page, 3, [Group(12, (trajectory(),))], decode)
    said = [(kind, text) for kind, text in Page(page.read_text()).texts if "<t" in text]
    assert said == [("prompt", "<t1> <t2>"), ("chosen", "<t3> <t4>"), ("seen", "<t5>"), ("chosen", "<t6>")]
    text = page.read_text()
    for fact in ("Step 3: mean reward 1 of 1", "reward 1 ", "prompt 12", "3 tokens chosen", "version 7 to 9"):
        assert fact in text


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "</pre><img src=x onerror=y>", "&amp;", '" onclick="'])
def test_everything_is_escaped(tmp_path, evil):
    page = tmp_path / "page.html"
    failed = trajectory(None, info={"error": evil, evil: evil})
    add_transcripts(page, 1, [Group(0, (failed,)), Group(1, (trajectory(),))], lambda ids, special: evil)
    parsed = Page(page.read_text())
    assert not {"script", "img"} & set(parsed.tags)
    assert [text for kind, text in parsed.texts if kind == "chosen" and text == evil]
    assert any(kind == "none" and evil in text for kind, text in parsed.texts)
    assert "1 without" in page.read_text()


def steps(page) -> list[str]:
    return [line.split('"')[1] for line in page.read_text().splitlines() if line.startswith("<section")]


def test_a_run_that_resumes_replaces_what_it_repeats(tmp_path):
    page = tmp_path / "page.html"
    for step in (1, 2, 3, 4):
        add_transcripts(page, step, [Group(0, (trajectory(),))], decode)
    before = page.read_text()
    for step in (3, 4):
        add_transcripts(page, step, [Group(0, (trajectory(),))], decode)
    assert page.read_text() == before
    add_transcripts(page, 2, [Group(0, (trajectory(0.5),))], decode)
    assert steps(page) == ["step-1", "step-2"]
    assert list(tmp_path.iterdir()) == [page]


def test_a_few_are_shown_the_best_and_the_worst(tmp_path):
    page = tmp_path / "page.html"
    groups = [Group(i, tuple(trajectory(r, info={"which": f"{i}:{r}"}) for r in (0.25, 0.75, 0.5))) for i in range(9)]
    add_transcripts(page, 1, groups, decode, samples=3)
    text = page.read_text()
    assert [mark for mark in ("0:0.75", "1:0.25", "2:0.75") if mark in text] == ["0:0.75", "1:0.25", "2:0.75"]
    assert text.count("<article>") == 3


def test_a_step_without_anything_is_a_section_too(tmp_path):
    page = tmp_path / "page.html"
    add_transcripts(page, 1, [], decode)
    add_transcripts(page, 2, [Group(0, ())], decode)
    assert steps(page) == ["step-1", "step-2"]
    assert "no rewards" in page.read_text()
