"""The terminal chat: from a pipe, at a terminal, and what it says when something is wrong."""

import os
import pty
import subprocess
import sys

import pytest

from raytron.serving.chat import Chat


def run_chat(live, text: str, *flags: str) -> subprocess.CompletedProcess:
    """`raytron chat` with `text` as its standard input."""
    command = [sys.executable, "-m", "raytron.cli", "chat", "--url", f"{live.url}/v1", *flags]
    return subprocess.run(command, input=text.encode(), capture_output=True, timeout=60)


def test_lines_of_a_pipe_are_turns(live, client):
    ask = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    turns = [{"role": "system", "content": "be brief"}]
    expected = b""
    for text in ("one", "two"):
        turns.append({"role": "user", "content": text})
        said = client.chat.completions.create(messages=turns, **ask).choices[0].message.content
        turns.append({"role": "assistant", "content": said})
        expected += said.encode() + b"\n"
    done = run_chat(live, "one\n\ntwo\n", "--max-tokens", "8", "--temperature", "0", "--system", "be brief")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_at_a_terminal(live):
    """Commands, an answer, an error that leaves the conversation as it was, and the end."""
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "raytron.cli", "chat", "--url", f"{live.url}/v1", "--max-tokens", "5"]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env={**os.environ, "TERM": "dumb"})
    os.close(child)
    seen = b""

    def until(*wanted: bytes) -> None:
        nonlocal seen
        while not all(text in seen for text in wanted):
            seen += os.read(parent, 65536)

    def type_(text: str) -> None:
        nonlocal seen
        seen = b""
        os.write(parent, text.encode() + b"\n")

    try:
        until(b"tiny", b"> ")
        type_("hello")
        until(b"5 tokens", b"> ")
        type_("/nonsense")
        until(b"no command", b"> ")
        type_("x" * 600)
        until(b"context is 512 tokens", b"> ")
        type_("/model")
        until(b"tiny", b"> ")
        type_("/reset")
        until(b"forgotten", b"> ")
        type_("/quit")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def test_a_refused_turn_was_never_said(live):
    chat = Chat(f"{live.url}/v1", model="tiny", options={"max_tokens": 5})
    chat.ask("hello", lambda piece: None)
    with pytest.raises(ValueError, match="context is 512 tokens"):
        chat.ask("x" * 600, lambda piece: None)
    assert [turn["role"] for turn in chat.history] == ["user", "assistant"]
    chat.close()


def test_an_answer_can_be_interrupted(live):
    chat = Chat(f"{live.url}/v1", model="tiny", options={"max_tokens": 400})
    pieces = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    spoken = chat.ask("hello", interrupt)
    assert spoken.reason == "stopped"
    assert chat.history[-1] == {"role": "assistant", "content": "".join(pieces)}
    chat.close()


def test_no_server_is_one_line(live):
    done = run_chat(live, "hi\n", "--url", "http://127.0.0.1:9/v1")
    assert done.returncode == 2
    assert b"is it running?" in done.stderr
    assert b"Traceback" not in done.stderr
