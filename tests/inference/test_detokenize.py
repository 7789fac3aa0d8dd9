"""Text as it streams is the text of all tokens at once, and stop texts end it wherever tokens end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data import ByteTokenizer, train_bpe
from raytron.inference.detokenize import TextStream

TEXT = "the cat sat on the mat, the dog – naïve, 東京 – ate the cat's food. " * 20


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return {"byte": ByteTokenizer(), "bpe": train_bpe([str(file)], 300)}


def streamed(tokenizer, prompt: str, ids: list[int], stops=()) -> tuple[list[str], str | None]:
    stream = TextStream(tokenizer.backend, tokenizer.encode(prompt), stops)
    shown = []
    for token in ids:
        text, stop = stream.push(token)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, stream.flush()], None


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_pieces_add_up_to_the_text(tokenizers, kind):
    tokenizer = tokenizers[kind]

    @given(st.text(alphabet="the cat東é–\n", min_size=1, max_size=30), st.sampled_from(["", "the ", "naïve"]))
    @settings(deadline=None, max_examples=60)
    def check(text, prompt):
        shown, stop = streamed(tokenizer, prompt, tokenizer.encode(text))
        assert "".join(shown) == text
        assert stop is None
        assert not any("\ufffd" in piece for piece in shown)

    check()


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_stop_text_is_found_across_tokens_and_never_shown(tokenizers, kind):
    tokenizer = tokenizers[kind]

    @given(
        st.text(alphabet="ab\n", max_size=20),
        st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    )
    @settings(deadline=None, max_examples=150)
    def check(text, stops):
        shown, stop = streamed(tokenizer, "", tokenizer.encode(text), stops)
        # tokens come one after the other: what ends first wins, and of what ends together what begins first
        ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
        if not ends:
            assert ("".join(shown), stop) == (text, None)
            return
        assert stop in stops
        assert "".join(shown) == text[: text.find(stop)]
        assert not any(other in "".join(shown) for other in stops)

    check()


def test_stops_do_not_count_before_they_may(tokenizers):
    stream = TextStream(tokenizers["byte"].backend, [], ["b"])
    assert stream.push(ord("b"), stopping=False) == ("b", None)
    assert stream.push(ord("b"), stopping=True) == ("", "b")
