"""Text on the HTTP side: token ids, what single tokens look like, and chats as prompts."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raytron.data.chat import ChatTemplate, Rendered
from raytron.data.tokenizer import HFTokenizer, byte_characters, load_tokenizer

__all__ = ["Rendered", "Text"]

LONG = 4096  # characters beyond which tokenising leaves the event loop
RESERVED = {"messages", "tools", "documents", "chat_template", "conversations", "return_assistant_tokens_mask"}


class Text:
    """A model's tokenizer and chat template, read from its Hugging Face directory. Raises ValueError without one."""

    def __init__(self, directory: str) -> None:
        self.tokenizer = load_tokenizer(directory)
        self.template = ChatTemplate(directory)
        self._bytes = functools.cache(self._token_bytes)
        self._alphabet = {character: byte for byte, character in enumerate(byte_characters())}

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
        named = self.template.special.get("bos_token")
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
        render = functools.partial(
            self.template.render,
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(extra or {}),
        )
        length = sum(len(message["content"]) for message in messages)
        return await asyncio.to_thread(render) if length > LONG or tools else render()
