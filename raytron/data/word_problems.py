"""Small word problems in GSM8K's form, made here: something to fine-tune on where there is no file yet."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

__all__ = ["write_word_problems"]

_NAMES = ("Ann", "Ben", "Eva", "Ida", "Leo", "Mia", "Sam", "Tom")
_THINGS = ("apples", "books", "coins", "eggs", "pens", "stones")
_MORE = ("finds", "gets", "buys")
_LESS = ("loses", "sells", "gives away")


def write_word_problems(path: str | os.PathLike[str], count: int = 4000, seed: int = 0) -> Path:
    """Write `count` lines of "question" and "answer", sums and differences of numbers below 10, fixed by `seed`."""
    path, chance = Path(path), random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        for _ in range(count):
            question, answer = _problem(chance)
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    partial.replace(path)
    return path


def _problem(chance: random.Random) -> tuple[str, str]:
    name, things, adds = chance.choice(_NAMES), chance.choice(_THINGS), chance.random() < 0.5
    a = chance.randint(0, 9)
    b = chance.randint(0, 9 if adds else a)
    verb = chance.choice(_MORE if adds else _LESS)
    said, sign, result = (f"{b} more", "+", a + b) if adds else (str(b), "-", a - b)
    question = f"{name} has {a} {things} and {verb} {said}. How many {things} does {name} have?\n"
    return question, f"{a} {sign} {b} = {result}\n#### {result}"
