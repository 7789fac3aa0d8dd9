"""Lines of JSON as examples to fine-tune on: token ids, and which of them the model is to learn to write.

Three kinds of lines, which a file may mix:

    {"prompt": "7 + 5 =", "response": " 12"}            texts; the answer is followed by the end-of-sequence token
    {"messages": [{"role": "user", "content": ...}]}     a chat, through the tokenizer's template; every assistant turn
    {"tokens": [0, 5, 9, 1], "chosen": [0, 0, 1, 1]}     ids, and which were chosen: a trajectory of RL

Texts are encoded piece by piece, what the model is given apart from what it writes, as it happens when it is used: its
prompt is encoded alone, and no token joins the two. (Encoding the whole and looking up offsets gives tokens at the
border that no prompt ever ends with.)
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytron.data.chat import ChatTemplate
from raytron.data.corpus import JSONL_SUFFIXES, find_files, kind_of
from raytron.data.tokenizer import HFTokenizer, Tokenizer

__all__ = ["PROMPT_KEYS", "RESPONSE_KEYS", "Example", "ExampleReader", "example_files"]

# The keys that a line of texts may use, first come first served.
PROMPT_KEYS = ("prompt", "question", "instruction")
RESPONSE_KEYS = ("response", "completion", "answer", "output")

ROLES = ("system", "user", "assistant", "tool")
FORMS = '{"prompt": ..., "response": ...}, {"messages": [...]} or {"tokens": [...], "chosen": [...]}'
CHUNK = 512  # lines that are encoded together


@dataclass(frozen=True)
class Example:
    """tokens: ids. chosen: of each, whether it is the model's to write. line: of the file, from 1."""

    tokens: Sequence[int]
    chosen: Sequence[bool]
    line: int


@dataclass(frozen=True)
class _Text:
    """A line whose pieces (text, whether it is learnt) are still to be encoded. opened: by the tokenizer's own
    beginning of a text."""

    pieces: list[tuple[str, bool]]
    opened: bool
    line: int


def example_files(path: str) -> list[Path]:
    """A JSONL file, or those of a folder in the order of their names. ValueError where there are none."""
    files = [file for file in find_files(path) if kind_of(file) == "jsonl" or file.suffix == ".json"]
    if not files:
        raise ValueError(f"{path}: no {' or '.join(JSONL_SUFFIXES)} file; give lines of JSON: {FORMS}")
    return files


class ExampleReader:
    """Reads examples.

    Args:
        tokenizer: for texts; ids must lie in its vocabulary.
        directory: where its chat template is, if it has one (see `ChatTemplate`).
        chat: take a prompt and its response for the turns of a chat, too.
    """

    def __init__(self, tokenizer: Tokenizer, directory: str, chat: bool = False) -> None:
        self._tokenizer, self._chat, self._template = tokenizer, chat, ChatTemplate(directory)
        self._specials = _special_tokens(tokenizer)
        self._opening = _opening(tokenizer)

    def read(self, file: Path) -> Iterator[Example]:
        """The examples of a file. ValueError names the line that is none, and how to mend it."""
        with file.open("rb") as lines:
            numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
            while chunk := list(itertools.islice(numbered, CHUNK)):
                parsed = [self._parse(f"{file}:{number}", number, line) for number, line in chunk]
                yield from self._encode(file, parsed)

    def _parse(self, where: str, number: int, line: bytes) -> Example | _Text:
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} isn't UTF-8 (byte {error.start} of the line); convert the file") from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: malformed JSON ({error.msg} at column {error.colno}); mend or remove the line"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a JSON {type(record).__name__} where an object is needed: {FORMS}")
        if "messages" in record:
            return _Text(self._of_messages(where, record["messages"], record.get("tools")), False, number)
        if "tokens" in record:
            return Example(*self._of_tokens(where, record), number)
        prompt, response = _pair(where, record)
        if self._chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return _Text(self._of_messages(where, turns), False, number)
        return _Text([(prompt, False), (response, True)], True, number)

    def _of_messages(self, where: str, messages: Any, tools: Any = None) -> list[tuple[str, bool]]:
        _check_messages(where, messages)
        messages = [message | {"content": message.get("content") or ""} for message in messages]  # calls may have none
        try:
            return self._template.pieces(messages, tools, self._specials)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; mend or remove the line") from None

    def _of_tokens(self, where: str, record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        tokens, chosen = record["tokens"], record.get("chosen")
        if not (isinstance(tokens, list) and isinstance(chosen, list) and len(tokens) == len(chosen)):
            raise ValueError(f"{where}: `tokens` and `chosen` must be lists of one length; write {FORMS}")
        if not all(type(token) is int and 0 <= token < self._tokenizer.vocab_size for token in tokens):
            raise ValueError(
                f"{where}: `tokens` must be ids from 0 to {self._tokenizer.vocab_size - 1}, the tokenizer's last; name "
                "the tokenizer that they are of in data.tokenizer"
            )
        if not all(mark in (0, 1) for mark in chosen):
            raise ValueError(f"{where}: `chosen` must hold true or false (1 or 0) for each token")
        if not any(chosen[1:]):
            raise ValueError(f"{where}: no token behind the first is chosen, so there is nothing to learn; remove it")
        return tokens, [bool(mark) for mark in chosen]

    def _encode(self, file: Path, parsed: Sequence[Example | _Text]) -> Iterator[Example]:
        """Texts are encoded together: the tokenizer then uses all cores."""
        texts = [text for item in parsed if isinstance(item, _Text) for text, _ in item.pieces]
        try:
            encoded = iter(self._tokenizer.encode_batch(texts))
        except ValueError as error:
            raise ValueError(f"{file}:{parsed[0].line} to :{parsed[-1].line}: {error}") from None
        for item in parsed:
            yield self._joined(file, item, encoded) if isinstance(item, _Text) else item

    def _joined(self, file: Path, item: _Text, encoded: Iterator[list[int]]) -> Example:
        tokens = list(self._opening) if item.opened else []
        chosen = [False] * len(tokens)
        for _, learnt in item.pieces:
            ids = next(encoded)
            tokens += ids
            chosen += [learnt] * len(ids)
        if not tokens or chosen[0]:
            raise ValueError(f"{file}:{item.line}: the prompt is empty; an answer has to follow something")
        if tokens[-1] not in self._specials.values():
            tokens, chosen = [*tokens, self._tokenizer.eod], [*chosen, True]
        return Example(tokens, chosen, item.line)


def _pair(where: str, record: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and response of a line of texts."""
    found = []
    for keys in (PROMPT_KEYS, RESPONSE_KEYS):
        key = next((key for key in keys if key in record), None)
        if key is None:
            there = ", ".join(record) or "nothing"
            raise ValueError(f"{where}: none of the keys {', '.join(keys)}, there is {there}; write {FORMS}")
        found.append(_text(where, key, record[key]))
    if not found[1]:
        raise ValueError(f"{where}: {key!r} is empty, so there is nothing to learn; remove the line")
    return found[0], found[1]


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} holds {type(value).__name__}, not text; write {FORMS}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half of a surrogate pair in {key!r}; write the whole character") from None
    return value


def _check_messages(where: str, messages: Any) -> None:
    """ValueError unless they are a chat with something to learn."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{where}: `messages` must be a list such as [{{"role": "user", "content": "..."}}, ...]')
    for number, message in enumerate(messages, 1):
        role, calls = message.get("role"), message.get("tool_calls")
        if role not in ROLES:
            raise ValueError(f"{where}: message {number} has the role {role!r}; use one of {', '.join(ROLES)}")
        if not (calls and message.get("content") is None):
            _text(where, f"content of message {number}", message.get("content"))
        if calls and not all(isinstance(call, dict) and _is_function(call.get("function")) for call in calls):
            raise ValueError(
                f'{where}: message {number} has tool calls unlike {{"function": {{"name": ..., "arguments": ...}}}}'
            )
        if role == "assistant" and not (message.get("content") or calls):
            raise ValueError(f"{where}: message {number}, an assistant's, is empty; remove it or the line")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: no message is an assistant's, so there is nothing to learn; remove the line")


def _is_function(function: Any) -> bool:
    return isinstance(function, dict) and {"name", "arguments"} <= function.keys()


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens by their text: one of them ends an answer."""
    if not isinstance(tokenizer, HFTokenizer):
        return {}
    added = tokenizer.backend.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def _opening(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer's own template puts before a text (a beginning-of-text), as engines do with a prompt."""
    if not isinstance(tokenizer, HFTokenizer):
        return []
    text = "a"
    with_them = tokenizer.backend.encode(text).ids
    plain = tokenizer.backend.encode(text, add_special_tokens=False).ids
    at = next((at for at in range(len(with_them)) if with_them[at : at + len(plain)] == plain), 0)
    return with_them[:at]
