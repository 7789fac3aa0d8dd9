"""Real text that every machine with Python has: the standard library's sources and the language reference in pydoc."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["write_stdlib_corpus"]

# Vendored packages, tests and tables of numbers are no text worth reading.
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "lib2to3",
    "pydoc_data",
    "__pycache__",
}


def write_stdlib_corpus(path: str | os.PathLike[str]) -> Path:
    """Write the corpus as JSONL, one document ("text", "source") per module and per topic of the language reference.

    About 10 MB, the same on every machine with the same Python. Modules come in order of their names.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        for source, text in _documents():
            file.write(json.dumps({"text": text, "source": source}) + "\n")
    partial.replace(path)
    return path


def _documents() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from sorted(topics.items())
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        part = file.relative_to(root)
        if not _SKIPPED.intersection(part.parts):
            yield part.as_posix(), file.read_text(encoding="utf-8", errors="ignore")
