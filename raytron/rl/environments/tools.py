"""Tools for models that write text: a call is JSON in the answer, its result comes back as tokens.

    <tool_call>{"name": "calculator", "arguments": {"expression": "3 * 14"}}</tool_call>

A tool that fails tells the model what was wrong, as any result: calling a tool badly is the model's mistake, not ours.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raytron.rl.environments.base import Generated

__all__ = ["TextTools", "ToolTurn"]

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_ANSWER, _RESULT = "\ue000answer\ue000", "\ue000result\ue000"  # characters for private use, which no template writes


class _Template(Protocol):
    def render(self, messages: Sequence[Mapping[str, Any]]) -> Any: ...


@dataclass(frozen=True)
class ToolTurn:
    """What a chat template writes between an answer and the next one, around a tool's result."""

    before: str
    after: str

    @classmethod
    def of(cls, template: _Template) -> ToolTurn:
        """Of a `raytron.data.chat.ChatTemplate`. ValueError where it has no place for a tool's result."""
        talk = (("user", "?"), ("assistant", _ANSWER), ("tool", _RESULT))
        messages = [{"role": role, "content": content} for role, content in talk]
        text = template.render(messages).prompt.partition(_ANSWER)[2]
        before, found, after = text.partition(_RESULT)
        if not found:
            raise ValueError("the model's chat template has no place for the results of tools; use another model")
        return cls(before, after)


class TextTools:
    """Carries out the last call in an answer.

    Args:
        tools: name -> function of the call's arguments, sync (quick) or async; its result is written with str().
        encode: text to token ids.
        turn: what stands around a result.
        most: characters of a result that are passed on.
    """

    def __init__(
        self,
        tools: Mapping[str, Callable[..., Any]],
        encode: Callable[[str], Sequence[int]],
        turn: ToolTurn,
        most: int = 2000,
    ) -> None:
        self._tools, self._encode, self._turn, self._most = dict(tools), encode, turn, most

    async def __call__(self, answer: Generated) -> tuple[int, ...] | None:
        """Tokens of the result, None for an answer without a call."""
        calls = _CALL.findall(answer.text or "")
        if not calls:
            return None
        result = await self._result(calls[-1])
        ids = tuple(self._encode(f"{self._turn.before}{result[: self._most]}{self._turn.after}"))
        ended = bool(ids) and answer.token_ids[-1:] == ids[:1]  # the end of the turn, which the model wrote itself
        return ids[1:] if ended else ids

    async def _result(self, call: str) -> str:
        try:
            said = json.loads(call)
            result = self._tools[said["name"]](**said.get("arguments", {}))
            return str(await result if inspect.isawaitable(result) else result)
        except Exception as error:  # whatever a tool makes of what the model wrote
            return f"error: {type(error).__name__}: {error}"
