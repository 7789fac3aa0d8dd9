"""Verifiers that only compare: texts, tokens, the number an answer ends on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from raytron.rl.environments.base import Generated, Prompt

__all__ = ["Exact", "FinalNumber", "Tokens"]

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(r"####\s*\$?\s*(" + _NUMBER + ")")
_ANY = re.compile(_NUMBER)


class Exact:
    """1.0 where the text is the prompt's answer, both normalised (by default stripped)."""

    def __init__(self, normalise: Callable[[str], str] = str.strip) -> None:
        self._normalise = normalise

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        return float(self._normalise(answer.text) == self._normalise(prompt.answer))


class Tokens:
    """How the tokens compare with the prompt's answer, which are tokens too, the end token included.

    dense: the share of them that the answer begins with (so each further right token is worth something); else 1.0 for
    all and nothing more, 0.0 for less.
    """

    def __init__(self, dense: bool = True) -> None:
        self._dense = dense

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        return (
            prefix_share(answer.token_ids, prompt.answer) if self._dense else float(answer.token_ids == prompt.answer)
        )


def prefix_share(tokens: Sequence[int], wanted: Sequence[int]) -> float:
    """The share of `wanted`, from its start, that `tokens` begins with; of nothing at all it is 1."""
    pairs = zip(tokens, wanted, strict=False)
    right = next((i for i, (token, want) in enumerate(pairs) if token != want), min(len(tokens), len(wanted)))
    return right / len(wanted) if wanted else 1.0


class FinalNumber:
    """1.0 where the number behind the last #### is the prompt's answer (GSM8K).

    strict: False takes the last number of a text that has no ####.
    """

    def __init__(self, strict: bool = True) -> None:
        self._strict = strict

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        found = _MARKED.findall(answer.text) or ([] if self._strict else _ANY.findall(answer.text))
        return float(bool(found) and number(found[-1]) == number(str(prompt.answer)))


def number(text: str) -> Decimal:
    """Of "1,234.50" and the like."""
    return Decimal(text.replace(",", ""))
