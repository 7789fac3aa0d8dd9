"""A chat in the terminal with any server that speaks OpenAI's API.

What is typed goes out with all that was said before, the answer is printed as it comes; Ctrl-C stops it and keeps what
was said so far. With standard input from a file or a pipe every line is a turn, and only the answers are printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ["Chat", "Spoken", "talk"]

HELP = """/reset            forget what was said
/system TEXT      set the system prompt; nothing after it takes it away
/model NAME       talk to another model; nothing after it lists them
/quit             (or Ctrl-D) end
Ctrl-C stops an answer; a line that ends with \\ goes on in the next."""


@dataclass(frozen=True)
class Spoken:
    """An answer: its text, tokens, seconds to the first one and altogether, and what ended it."""

    text: str
    tokens: int
    first_s: float
    seconds: float
    reason: str

    def told(self) -> str:
        """One line about it."""
        speed = (self.tokens - 1) / (self.seconds - self.first_s) if self.seconds > self.first_s else 0.0
        ends = {"length": ", cut at the most tokens", "stopped": ", stopped"}.get(self.reason, "")
        return f"{self.tokens} tokens, {speed:.1f} tokens/s, first after {self.first_s:.2f} s{ends}"


@dataclass
class Chat:
    """A conversation.

    url: of the API, ending in /v1. options: fields of the request besides messages, such as temperature.
    history: turns so far, without the system prompt.
    """

    url: str = "http://127.0.0.1:8000/v1"
    key: str | None = None
    model: str = ""
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(600, connect=10))

    def models(self) -> list[str]:
        """Their names. Raises ValueError where the server can't be reached, or refuses."""
        with _plain_errors(self.url):
            response = self._http.get("/models")
            _check(response)
            return [model["id"] for model in response.json()["data"]]

    def ask(self, text: str, show: Callable[[str], None]) -> Spoken:
        """Say something; `show` is given the answer in pieces. KeyboardInterrupt ends it early.

        Raises ValueError for what the server refuses; the turn is then as if it had never been said.
        """
        self.history.append({"role": "user", "content": text})
        pieces: list[str] = []
        begun, first, tokens, reason = time.perf_counter(), 0.0, 0, "stop"
        try:
            for event in self._events():
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                for choice in event.get("choices", ()):
                    if piece := choice["delta"].get("content"):
                        first = first or time.perf_counter() - begun
                        pieces.append(piece)
                        show(piece)
                    reason = choice.get("finish_reason") or reason
        except KeyboardInterrupt:
            reason = "stopped"
        except ValueError:
            self.history.pop()
            raise
        self.history.append({"role": "assistant", "content": "".join(pieces)})
        return Spoken("".join(pieces), tokens or len(pieces), first, time.perf_counter() - begun, reason)

    def _events(self) -> Iterator[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {
            "model": self.model,
            "messages": [*system, *self.history],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }
        with _plain_errors(self.url), self._http.stream("POST", "/chat/completions", json=body) as response:
            _check(response)
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(event["error"]["message"])
                    yield event

    def close(self) -> None:
        """Hang up."""
        self._http.close()


class _plain_errors:  # noqa: N801 - used like a function
    """Connections that fail, as ValueError for the user."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
            hint = "; is it running? (raytron serve PATH)" if isinstance(error, httpx.ConnectError) else ""
            raise ValueError(f"{self.url}: {error}{hint}") from error


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text[:300] or response.reason_phrase
    raise ValueError(f"{said} ({response.status_code})")


def talk(chat: Chat) -> None:
    """Read lines and answer them until the end of the input, or /quit. Raises ValueError when there is no model."""
    chat.model = chat.model or _only_model(chat)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    _Terminal(chat).run() if interactive else _answer_lines(chat)


def _only_model(chat: Chat) -> str:
    models = chat.models()
    if not models:
        raise ValueError(f"{chat.url} serves no model")
    return models[0]


def _answer_lines(chat: Chat) -> None:
    for line in sys.stdin:
        if text := line.strip():
            chat.ask(text, lambda piece: print(piece, end="", flush=True))
            print()


class _Terminal:
    """The chat of someone at a keyboard."""

    def __init__(self, chat: Chat) -> None:
        from rich.console import Console

        self.chat, self.console = chat, Console(highlight=False)
        self.commands = {"/reset": self._reset, "/system": self._system, "/model": self._model, "/help": self._help}

    def run(self) -> None:
        """Until /quit."""
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its editing and history

        self.console.print(f"[bold]{self.chat.model}[/] at {self.chat.url}  [dim](/help, /quit)[/]")
        while (text := self._read()) is not None:
            command, _, rest = text.partition(" ")
            if command in ("/quit", "/exit"):
                return
            if command in self.commands:
                self.commands[command](rest.strip())
            elif command.startswith("/") and command[1:].isalpha():
                self.console.print(f"[red]{command} is no command[/]; /help lists them")
            elif text.strip():
                self._answer(text)

    def _read(self) -> str | None:
        """What is typed next; None at the end."""
        try:
            text = input("\n> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input("  ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            return ""
        return text

    def _answer(self, text: str) -> None:
        try:
            spoken = self.chat.ask(text, lambda piece: print(piece, end="", flush=True))
        except ValueError as error:
            self.console.print(str(error), style="red", markup=False)
        else:
            self.console.print(f"\n{spoken.told()}", style="dim", markup=False)

    def _reset(self, _: str) -> None:
        self.chat.history.clear()
        self.console.print("[dim]forgotten[/]")

    def _system(self, text: str) -> None:
        self.chat.system = text or None
        self.console.print("[dim]system prompt " + ("set" if text else "taken away") + "[/]")

    def _model(self, name: str) -> None:
        try:
            models = self.chat.models()
        except ValueError as error:
            self.console.print(str(error), style="red", markup=False)
            return
        if name in models:
            self.chat.model = name
        self.console.print("  ".join(f"[bold]{m}[/]" if m == self.chat.model else m for m in models))

    def _help(self, _: str) -> None:
        self.console.print(HELP, markup=False)
