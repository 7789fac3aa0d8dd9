"""Values of arithmetic in words: numbers, + - * /, parentheses. Exact, and nothing is ever evaluated by Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["apply", "evaluate", "value_of", "written"]

_WORD = re.compile(r"\s*(\d+(?:\.\d+)?|[-+*/()])")
_MOST_WORDS, _MOST_DIGITS = 256, 32


def evaluate(words: Sequence[str]) -> Fraction:
    """Value of "3 + 4 * ( 2 - 1 )", split. ValueError for what is no expression, or divides by zero."""
    if len(words) > _MOST_WORDS:
        raise ValueError(f"more than {_MOST_WORDS} words")
    left = list(reversed(words))
    value = _sum(left)
    if left:
        raise ValueError(f"{left[-1]!r} where the expression should end")
    return value


def value_of(text: str) -> Fraction:
    """The same for text, spaces or none between its words."""
    words, at = [], 0
    text = text.strip()
    while at < len(text):
        found = _WORD.match(text, at)
        if not found or len(found[1]) > _MOST_DIGITS:
            raise ValueError(f"{text[at : at + 20]!r} is no number, operator or parenthesis")
        words.append(found[1])
        at = found.end()
    return evaluate(words)


def written(value: Fraction) -> str:
    """As an integer, or as a decimal of at most 10 significant digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def apply(operator: str, a: Fraction, b: Fraction) -> Fraction:
    """a operator b."""
    if operator == "/":
        if b == 0:
            raise ValueError("division by zero")
        return a / b
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def _sum(left: list[str]) -> Fraction:
    value = _product(left)
    while left and left[-1] in "+-":
        value = apply(left.pop(), value, _product(left))
    return value


def _product(left: list[str]) -> Fraction:
    value = _factor(left)
    while left and left[-1] in "*/":
        value = apply(left.pop(), value, _factor(left))
    return value


def _factor(left: list[str]) -> Fraction:
    if not left:
        raise ValueError("the expression ends too early")
    word = left.pop()
    if word == "-":
        return -_factor(left)
    if word == "(":
        value = _sum(left)
        if not left or left.pop() != ")":
            raise ValueError("a parenthesis is not closed")
        return value
    if not word[0].isdigit():
        raise ValueError(f"{word!r} where a number should be")
    return Fraction(word)
