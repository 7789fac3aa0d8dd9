"""Chats as prompts: a model's own chat template, rendered by transformers in jinja2's sandbox.

A model without a template is prompted in plain words, which suits one that was only pretrained:

    SYSTEM TEXT

    User: first question
    Assistant: first answer
    User: second question
    Assistant:

and then a line that begins with "User:" ends its answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ChatTemplate", "Rendered"]


@dataclass(frozen=True)
class Rendered:
    """A chat as a prompt, and the texts that end the answer besides the model's own end."""

    prompt: str
    stop: tuple[str, ...] = ()


class ChatTemplate:
    """The template in a Hugging Face directory.

    Attributes:
        special: `bos_token` and the like, as text.
        given: whether the directory has a template; without one chats are plain words.
    """

    def __init__(self, directory: str) -> None:
        self.special, self._templates = _special_tokens(Path(directory)), _templates(Path(directory))
        self.given = bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Any,
    ) -> Rendered:
        """The prompt for a chat; `options` go to the template. ValueError where it refuses; says what it said."""
        options |= {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        if not self._templates:
            return Rendered(_plainly(messages, tools, options), stop=("\nUser:",))
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._templates.get("tool_use" if tools else "default") or self._templates["default"]
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages], tools=tools, chat_template=template, **{**self.special, **options}
            )
        except Exception as error:  # templates raise whatever they like about messages they do not care for
            raise ValueError(f"the model's chat template can't take these messages: {error}") from error
        return Rendered(rendered[0])


def _plainly(messages: Sequence[Mapping], tools: Sequence[Mapping] | None, options: Mapping[str, Any]) -> str:
    """The prompt for a model without a template; see above."""
    opening = [message["content"] for message in messages if message["role"] == "system"]
    if tools:
        call = '<tool_call>{"name": NAME, "arguments": {...}}</tool_call>'
        opening += [f"Tools, called by writing {call}:", *(json.dumps(tool["function"]) for tool in tools)]
    names = {"user": "User", "assistant": "Assistant", "tool": "Tool"}
    turns = [f"{names[m['role']]}: {_said(m)}" for m in messages if m["role"] != "system"]
    if options["add_generation_prompt"] and not options["continue_final_message"]:
        turns.append("Assistant:")
    return "\n".join([*opening, *([""] if opening else []), *turns])


def _said(message: Mapping[str, Any]) -> str:
    calls = (call["function"] for call in message.get("tool_calls", ()))
    spelt = (json.dumps({"name": call["name"], "arguments": call["arguments"]}) for call in calls)
    return message["content"] + "".join(f"<tool_call>{call}</tool_call>" for call in spelt)


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    file = directory / "tokenizer_config.json"
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _special_tokens(directory: Path) -> dict[str, str]:
    """`bos_token` and the like, which templates refer to."""
    tokens = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in _tokenizer_config(directory).items()
        if name.endswith("_token")
    }
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _templates(directory: Path) -> dict[str, str]:
    """Name -> chat template: "default", and in some directories "tool_use"."""
    file = directory / "chat_template.jinja"
    found = file.read_text() if file.is_file() else _tokenizer_config(directory).get("chat_template")
    if isinstance(found, list):
        named = {template["name"]: template["template"] for template in found}
        return {"default": next(iter(named.values())), **named} if named else {}
    return {"default": found} if found else {}
