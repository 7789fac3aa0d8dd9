"""Text on the HTTP side: token ids, what single tokens look like, and chats as prompts.

A chat goes through the model's own template (transformers renders it, in jinja2's sandbox). A model without one is
prompted in plain words, which suits a model that was only pretrained:

    SYSTEM TEXT

    User: first question
    Assistant: first answer
    User: second question
    Assistant:

and then a line that begins with "User:" ends its answer.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytron.data.tokenizer import HFTokenizer, load_tokenizer

__all__ = ["Rendered", "Text"]

LONG = 4096  # characters beyond which tokenising leaves the event loop
RESERVED = {"messages", "tools", "documents", "chat_template", "conversations", "return_assistant_tokens_mask"}


@dataclass(frozen=True)
class Rendered:
    """A chat as a prompt, and the texts that end the answer besides the model's own end."""

    prompt: str
    stop: tuple[str, ...] = ()


class Text:
    """A model's tokenizer and chat template, read from its Hugging Face directory. Raises ValueError without one."""

    def __init__(self, directory: str) -> None:
        self.tokenizer = load_tokenizer(directory)
        self.special, self.templates = _special_tokens(Path(directory)), _templates(Path(directory))
        self._bytes = functools.cache(self._token_bytes)
        self._alphabet = {character: byte for byte, character in enumerate(_byte_characters())}

    # ---------------------------------------------------------------------------------------------------------- tokens

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text (BOS, for some). Long texts in a thread."""
        if len(text) > LONG:
            return await asyncio.to_thread(self._encode, text, special)
        return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> list[int]:
        tokenizer = self.tokenizer
        if special and type(tokenizer) is HFTokenizer:
            return tokenizer.backend.encode(text, add_special_tokens=True).ids
        return tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; part of a character, maybe. Special tokens are spelt out."""
        return self._bytes(token)

    def token_text(self, token: int) -> str:
        """What one token looks like: its text or, where that is no UTF-8, its bytes as OpenAI writes them."""
        raw = self._bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _token_bytes(self, token: int) -> bytes:
        backend = getattr(self.tokenizer, "backend", None)
        if backend is None:
            return f"{token} ".encode()
        spelt = backend.id_to_token(token)
        if spelt is None or token in backend.get_added_tokens_decoder():
            return (spelt or "").encode()
        if all(character in self._alphabet for character in spelt) and "ByteLevel" in str(backend.decoder):
            return bytes(self._alphabet[character] for character in spelt)
        if len(spelt) == 6 and spelt.startswith("<0x"):  # SentencePiece's way to write a byte
            return bytes([int(spelt[3:5], 16)])
        return spelt.replace("▁", " ").encode()

    @property
    def begin(self) -> int:
        """The token before a text: BOS, or the end of the document before where there is no such thing."""
        named = self.special.get("bos_token")
        backend = getattr(self.tokenizer, "backend", None)
        found = backend.token_to_id(named) if backend is not None and named else None
        return self.tokenizer.eod if found is None else found

    # ----------------------------------------------------------------------------------------------------------- chats

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The prompt for a chat. Raises ValueError where the template refuses it; says what it said."""
        if reserved := RESERVED & set(extra or ()):
            raise ValueError(f"chat_template_kwargs may not set {', '.join(sorted(reserved))}")
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **(extra or {}),
        }
        render = functools.partial(self._render, messages, tools, options)
        length = sum(len(message["content"]) for message in messages)
        return await asyncio.to_thread(render) if length > LONG or tools else render()

    def _render(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None, options: dict) -> Rendered:
        if not self.templates:
            return Rendered(_plainly(messages, tools, options), stop=("\nUser:",))
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.templates.get("tool_use" if tools else "default") or self.templates["default"]
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


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers (GPT-2) write for each of the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]
