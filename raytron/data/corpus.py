"""Raw text as a list of byte spans that can be read independently: the unit of parallelism, of streaming, of errors.

A corpus is text files, JSON lines and Parquet, alone or in folders (sorted by name, so the order is the same
anywhere). `plan_spans` cuts the files where nothing is torn apart: JSON lines between lines, Parquet between row
groups, text files after a line. The plan depends on the files alone, never on the number of workers, which is why the
output doesn't either. Reading whole files would be simpler, and would hold the largest file in memory, on one core.

A text file is one document. One longer than `piece_bytes` is stored as several pieces, each a document of the index
(which is what GPT data shuffles and splits by), with the end-of-document id after the last. "paragraph" (blank lines
between) and "line" make many documents of a file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
TEXT_DOCUMENTS = ("file", "paragraph", "line")

_LEADING_BLANKS = re.compile(r"\A(?:[ \t\r]*\n)+")
_BOM = b"\xef\xbb\xbf"
_CUTS = {
    # Between two visible ASCII characters a line end is a token of its own to every splitting in use, so that the
    # pieces encode to the ids of the whole. Text without one is cut after any line, or at worst between characters.
    "file": re.compile(rb"(?<=[!-~])\n(?=[!-~])"),
    "paragraph": re.compile(rb"\n[ \t\r]*\n"),
    "line": re.compile(rb"\n"),
    "jsonl": re.compile(rb"\n"),
}


@dataclass(frozen=True)
class Span:
    """Bytes [begin, end) of a file, or row group `begin` of a Parquet one. `ends`: the document ends with the span."""

    path: str
    kind: str  # file | paragraph | line | jsonl | parquet
    begin: int
    end: int
    size: int  # bytes, for progress
    ends: bool = True


class Text(NamedTuple):
    """One document (or piece of one) and what is needed to say where it stands."""

    text: str
    place: int  # line within the span (jsonl, line), row within the row group, else 0
    ends: bool


def find_files(inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files of a corpus, in the order in which they are read. Raises ValueError where there are none."""
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [f for f in path.rglob("*") if f.is_file() and kind_of(f) and not _hidden(f.relative_to(path))]
            files += sorted(found, key=lambda f: f.relative_to(path).as_posix())
        elif not path.is_file():
            raise ValueError(f"{path} isn't there: name a text, JSONL or Parquet file, or a folder of them")
        elif not kind_of(path) and path.suffix != ".json":
            raise ValueError(f"{path}: can't tell its format by the name; call it .txt, .jsonl or .parquet")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"{', '.join(map(str, paths))}: no .txt, .md, .jsonl or .parquet file; nothing to read")
    return files


def kind_of(path: Path) -> str | None:
    """text, jsonl or parquet, by the file's suffix."""
    suffix = path.suffix.lower()
    for kind, suffixes in (("text", TEXT_SUFFIXES), ("jsonl", JSONL_SUFFIXES), ("parquet", PARQUET_SUFFIXES)):
        if suffix in suffixes:
            return kind
    return None


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def plan_spans(files: Sequence[Path], *, piece_bytes: int, json_key: str, text_documents: str = "file") -> list[Span]:
    """All of `files` as spans of about `piece_bytes` (Parquet: a row group each), in reading order."""
    if text_documents not in TEXT_DOCUMENTS:
        raise ValueError(f"text_documents={text_documents!r}: a document is one of {', '.join(TEXT_DOCUMENTS)}")
    spans: list[Span] = []
    for path in files:
        kind = kind_of(path) or "jsonl"  # a .json that was named outright: JSON lines, as Megatron calls them
        if kind == "parquet":
            spans += _parquet_spans(path, json_key)
        else:
            spans += _byte_spans(path, text_documents if kind == "text" else kind, piece_bytes)
    return spans


def _parquet_spans(path: Path, column: str) -> list[Span]:
    with _open_parquet(path) as file:
        if column not in file.schema_arrow.names:
            raise ValueError(
                f"{path}: no column {column!r}, there is {', '.join(file.schema_arrow.names)}; set json_key to the one"
                " with the text"
            )
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    return [Span(str(path), "parquet", group, group + 1, size) for group, size in enumerate(sizes)]


def _open_parquet(path: Path | str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} isn't a readable Parquet file ({error}); copy or export it again") from error


def _byte_spans(path: Path, kind: str, piece_bytes: int) -> Iterator[Span]:
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = 0
        while begin < size:
            # A rest of half a piece stays with its neighbour.
            end = _cut(file, kind, begin + piece_bytes, size) if size - begin > piece_bytes * 3 // 2 else size
            yield Span(str(path), kind, begin, end, end - begin, ends=kind != "file" or end == size)
            begin = end


def _cut(file: Any, kind: str, start: int, size: int) -> int:
    """The first place at or after byte `start` where a file of `kind` may be cut."""
    window = 1 << 16
    while True:
        file.seek(start - 1)
        buffer = file.read(window)
        if found := _CUTS[kind].search(buffer):
            return start - 1 + found.end()
        if start - 1 + len(buffer) >= size:
            return size
        if kind == "file":
            break  # prose without line ends must not grow one giant piece
        window *= 2  # lines and paragraphs are never cut, however long
    if (newline := buffer.find(b"\n")) >= 0:
        return start + newline
    return start - 1 + next(i for i in range(1, len(buffer)) if buffer[i] & 0xC0 != 0x80)


def read_span(span: Span, json_key: str) -> Iterator[Text]:
    """The documents of a span. Raises ValueError with the file, the line or byte, and the mend."""
    if span.kind == "parquet":
        yield from _read_rows(span, json_key)
        return
    text = _decode(span)
    if span.kind == "file":
        yield Text(text, 0, span.ends)
    elif span.kind == "paragraph":
        parts = (_LEADING_BLANKS.sub("", part) for part in re.split(r"\n[ \t\r]*\n", text))
        yield from (Text(part.rstrip("\r\n"), 0, True) for part in parts if part.strip())
    else:
        parse = _parse_line if span.kind == "jsonl" else lambda span, place, line, key: line.rstrip("\r")
        for place, line in enumerate(text.split("\n")):
            if line.strip():
                yield Text(parse(span, place, line, json_key), place, True)


def _decode(span: Span) -> str:
    with open(span.path, "rb") as file:
        file.seek(span.begin)
        raw = file.read(span.end - span.begin)
    bom = len(_BOM) if span.begin == 0 and raw.startswith(_BOM) else 0
    try:
        return raw[bom:].decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{span.path}: byte {span.begin + bom + error.start} (0x{raw[bom + error.start]:02x}) isn't UTF-8; convert"
            " the file to UTF-8"
        ) from None


def _parse_line(span: Span, place: int, line: str, key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where(span, place)}: malformed JSON ({error.msg} at column {error.colno}); each line must be one JSON"
            f' object such as {{"{key}": "..."}}; mend or remove the line'
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"{where(span, place)}: a JSON {type(record).__name__} where an object is needed")
    if key not in record:
        raise ValueError(f"{where(span, place)}: no key {key!r}, there is {', '.join(record)}; set json_key")
    return _checked(record[key], span, place, key)


def _checked(text: object, span: Span, place: int, key: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where(span, place)}: {key!r} holds {type(text).__name__}, not text; set json_key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where(span, place)}: half of a surrogate pair (\\u{ord(text[error.start]):04x}) in {key!r}; write the"
            " whole character"
        ) from None
    return text


def _read_rows(span: Span, column: str) -> Iterator[Text]:
    row = 0
    with _open_parquet(span.path) as file:
        for batch in file.iter_batches(batch_size=1024, row_groups=[span.begin], columns=[column]):
            for value in batch.column(0).to_pylist():
                yield Text("" if value is None else _checked(value, span, row, column), row, True)
                row += 1


def where(span: Span, place: int) -> str:
    """A document's place in words; lines are counted only here, when there is something to say about one."""
    if span.kind == "parquet":
        with _open_parquet(span.path) as table:
            before = sum(table.metadata.row_group(group).num_rows for group in range(span.begin))
        return f"{span.path} row {before + place}"
    if span.kind in ("file", "paragraph"):
        return f"{span.path} from byte {span.begin}"
    lines, rest = 1, span.begin
    with open(span.path, "rb") as file:
        while rest and (block := file.read(min(rest, 1 << 20))):
            lines += block.count(b"\n")
            rest -= len(block)
    return f"{span.path} line {lines + place}"
