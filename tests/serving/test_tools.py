"""Tool calls in text: the same whatever pieces it comes in, and what only looks like a call stays text."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raytron.serving.tools import ToolParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "<b>"}}\n</tool_call>'


def parse(pieces: list[str]) -> tuple[str, list[tuple[str, object]]]:
    parser, content, calls = ToolParser(), "", []
    for number, piece in enumerate(pieces):
        more, found = parser.feed(piece, last=number == len(pieces) - 1)
        content += more
        calls += [(call.name, json.loads(call.arguments)) for call in found]
    return content, calls


@given(
    st.lists(st.sampled_from([CALL, "<tool_call>", "</tool_call>", "<tool", "text", "{", "\n"]), max_size=8),
    st.lists(st.integers(0, 400), max_size=20),
)
@example([CALL, "text", CALL, "\n"], [134, 135])  # a line's end behind a call, in a piece of its own
def test_pieces_do_not_matter(parts, cuts):
    text = "".join(parts)
    cuts = sorted({cut for cut in cuts if cut <= len(text)} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)] or [""]
    assert parse(pieces) == parse([text])


@given(st.text(alphabet="ab<tool_call>/{}\n", max_size=60))
def test_text_without_a_call_is_kept(text):
    content, calls = parse(list(text) or [""])
    assert calls == []
    assert content == text


def test_several_calls_and_the_text_before():
    content, calls = parse([f"I look. {CALL}\n{CALL}"])
    assert content == "I look. "
    assert calls == [("f", {"x": "<b>"})] * 2


@pytest.mark.parametrize("inside", ["{}", "[]", "nothing", '{"name": 5}', '{"name": "f"', "[" * 10_000])
def test_what_is_no_call_stays_text(inside):
    text = f"<tool_call>{inside}</tool_call> after"
    assert parse([text]) == (text, [])


def test_a_call_cut_off_before_its_end_tag_counts():
    assert parse(['<tool_call>{"name": "f", "arguments": {}}'])[1] == [("f", {})]
