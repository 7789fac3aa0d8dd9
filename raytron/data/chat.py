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
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ChatTemplate", "Rendered"]

_MARK = "\ue000"  # a private-use character, which nobody says


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

    def pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        ends: Collection[str] = (),
    ) -> list[tuple[str, bool]]:
        """A whole chat in consecutive texts, each with whether the assistant says it: what there is to learn.

        A turn begins where the prompt for it ends and goes to the end of its content or calls, and over one of `ends`
        (special tokens) that follows. Nothing is given of what follows the last turn.

        The places are found without knowing the template: the chat is rendered once more with a mark instead of the
        turn, and what differs is the turn. (Templates seldom have `{% generation %}` marks, and the rendering of a
        chat's beginning need not be the beginning of its rendering: some drop the reasoning of earlier turns.)

        Raises ValueError where the template refuses the messages, or leaves an assistant's turn out.
        """
        whole = self.render(messages, tools, add_generation_prompt=False).prompt
        end_token = re.compile(rf"\s*(?:{'|'.join(map(re.escape, ends))})") if ends else None
        out: list[tuple[str, bool]] = []
        at = 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin, end = self._place(whole, messages, turn, tools)
            if end_token is not None and (found := end_token.match(whole, end)):
                end = found.end()
            out += [(whole[at:begin], False), (whole[begin:end], True)]
            at = end
        return [(text, said) for text, said in out if text]

    def _place(
        self, whole: str, messages: Sequence[Mapping], turn: int, tools: Sequence[Mapping] | None
    ) -> tuple[int, int]:
        """Where in the rendered chat an assistant's turn is."""
        marked = [*messages[:turn], {"role": "assistant", "content": _MARK}, *messages[turn + 1 :]]
        other = self.render(marked, tools, add_generation_prompt=False).prompt
        if other.count(_MARK) != 1:
            raise ValueError(f"the model's chat template leaves out message {turn + 1}, an assistant's")
        begin = len(os.path.commonprefix((whole, other)))
        end = len(whole) - len(os.path.commonprefix((whole[::-1], other[::-1])))
        prompt = self.render(messages[:turn], tools).prompt if turn else ""
        if turn and len(prompt) <= end and whole.startswith(prompt):
            begin = len(prompt)  # what a template writes behind it, such as an empty thought, is the model's to write
        return begin, end


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
