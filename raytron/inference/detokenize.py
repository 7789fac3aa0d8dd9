"""Text of tokens as they come, and the stop texts in it.

A token may end in the middle of a character, and its text may depend on the one before; the tokenizers library's
`DecodeStream` gives text only once it is final. Stop texts are searched in the text, so they may lie across tokens, and
what could still become one is held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_CONTEXT = 6  # tokens of the prompt that may decide how the first new ones are written


class TextStream:
    """The text of one sequence.

    Args:
        backend: a `tokenizers.Tokenizer`.
        prompt: the prompt's ids.
        stops: texts that end it.
    """

    def __init__(self, backend: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend, self._stops = backend, stops
        try:
            self._stream = DecodeStream(ids=list(prompt[-_CONTEXT:]), skip_special_tokens=True)
        except TypeError:  # tokenizers before 0.22 begin with nothing
            self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""

    def push(self, token: int, stopping: bool = True) -> tuple[str, str | None]:
        """(text that may be shown now, the stop text that ends the sequence) after one more token.

        stopping: whether stop texts count yet.
        """
        text = self._held + (self._stream.step(self._backend, token) or "")
        if stopping:
            found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
            if found:
                at, stop = min(found, key=lambda f: f[0])
                self._held = ""
                return text[:at], stop
        keep = _overlap(text, self._stops) if self._stops else 0
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, when the sequence ended otherwise."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop text begins with."""
    longest = min(len(text), max(map(len, stops)) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
