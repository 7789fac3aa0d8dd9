"""Tool calls: found in what a model writes (Hermes' form), and forced on it where the client asks for one.

Such models write `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, as often as they like and with text before
it. `ToolParser` takes text as it comes and gives what is certain; a text that only looks like a call stays text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raytron.serving.protocol import ChatRequest, Refused, Tool

__all__ = ["ToolCall", "ToolParser", "choice_of", "forced_calls"]

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A call the model wrote; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolParser:
    """Splits growing text into content and calls. One for each sequence."""

    def __init__(self) -> None:
        self._held = ""  # may become a call, or begin to
        self._behind = False  # a call, whose line's end is no content: it may come with a later piece

    def feed(self, text: str, *, last: bool = False) -> tuple[str, list[ToolCall]]:
        """The content and the calls that are certain after `text`; with `last` everything is."""
        self._held += text
        content, calls = "", []
        while True:
            if self._behind:
                self._held = self._held.lstrip("\n")
                self._behind = not self._held
            before, begun, rest = self._held.partition(BEGIN)
            if not begun:
                kept = 0 if last else _overlap(self._held, BEGIN)
                content += self._held[: len(self._held) - kept]
                self._held = self._held[len(self._held) - kept :]
                return content, calls
            inside, ended, after = rest.partition(END)
            content += before
            if not ended and not last:
                self._held = BEGIN + rest
                return content, calls
            call = _read(inside)
            calls += [call] if call else []
            content += "" if call else begun + inside + ended
            self._held, self._behind = after, call is not None


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of `text` that are the beginning of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def _read(inside: str) -> ToolCall | None:
    try:
        call = json.loads(inside)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return ToolCall(call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))


def choice_of(request: ChatRequest) -> tuple[Sequence[Tool], str | None, str | None]:
    """What `tools` and `tool_choice` come to: (tools for the template, name of the one forced, JSON schema forced).

    A named function forces its arguments' schema; "required" a list of calls of any; "auto" and nothing force nothing.
    """
    tools, choice = request.tools or [], request.tool_choice
    if choice in (None, "auto", "none"):
        return ([] if choice == "none" else tools), None, None
    if choice == "required":
        if not tools:
            raise Refused('tool_choice "required" needs tools', param="tool_choice")
        calls = [_call_schema(tool) for tool in tools]
        return tools, "", json.dumps({"type": "array", "minItems": 1, "items": {"anyOf": calls}})
    named = choice.function.name  # type: ignore[union-attr]
    tool = next((tool for tool in tools if tool.function.name == named), None)
    if tool is None:
        raise Refused(f"tool_choice names {named[:80]!r}, which tools doesn't have", param="tool_choice")
    return tools, named, json.dumps(tool.function.parameters or {"type": "object"})


def _call_schema(tool: Tool) -> dict[str, Any]:
    arguments = tool.function.parameters or {"type": "object"}
    properties = {"name": {"const": tool.function.name}, "arguments": arguments}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def forced_calls(text: str, named: str) -> list[ToolCall] | None:
    """The calls in text that a schema of `choice_of` forced; None where it was cut off in the middle."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if named:
        return [ToolCall(named, text)]
    return [ToolCall(call["name"], json.dumps(call["arguments"])) for call in found]
