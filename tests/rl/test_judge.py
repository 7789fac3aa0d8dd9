"""A language model as the judge, against a server that answers as told."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from raytron.rl.environments import Generated, Prompt
from raytron.rl.rewards import JudgeError, LLMJudge, judged

PROMPT = Prompt(0, (), answer="Paris", text="Capital of {France}?")


class Endpoint(ThreadingHTTPServer):
    """Gives the replies in turn (the last one for ever), keeps what was asked. A reply: (status, headers, body)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, dict, object]] = []
        self.asked: list[tuple[str, dict, dict]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def says(self, *texts: str) -> None:
        self.replies += [(200, {}, {"choices": [{"message": {"content": text}}]}) for text in texts]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        replies = self.server.replies
        status, headers, reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if status == 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(endpoint: Endpoint, text: str = "It is {Paris}.", **options):
    judge = LLMJudge(endpoint.url, "judge", **{"wait_s": 0.001, "retries": 2, **options})
    return asyncio.run(judge(PROMPT, Generated((), (), (), text=text)))


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Right.\nScore: 10", 1.0), ("score: 7.5", 0.75), ("Score: 3? no.\n**Score:** 0", 0.0), ("Score: 10/10", 1.0)],
)
def test_the_last_score_counts(endpoint, reply, score):
    endpoint.says(reply)
    assert ask(endpoint) == score


def test_what_is_asked(endpoint):
    endpoint.says("Score: 1")
    ask(endpoint, api_key="key", request={"max_tokens": 7})
    path, headers, body = endpoint.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer key"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 7, 0.0)
    for part in ("Capital of {France}?", "Paris", "It is {Paris}."):
        assert part in body["messages"][0]["content"]


@pytest.mark.parametrize("reply", ["", "I cannot say", "Score: 11", "Score: -1", "Score: ten"])
def test_a_reply_without_a_score_is_an_error(endpoint, reply):
    endpoint.says(reply)
    with pytest.raises(JudgeError, match="no score"):
        ask(endpoint)


@pytest.mark.parametrize("trouble", [(500, {}, "oops"), (429, {"Retry-After": "0"}, "slowly"), (0, {}, None)])
def test_trouble_that_passes_is_retried(endpoint, trouble):
    endpoint.replies += [trouble, trouble]
    endpoint.says("Score: 5")
    assert ask(endpoint) == 0.5
    assert len(endpoint.asked) == 3


def test_trouble_that_stays_is_an_error(endpoint):
    endpoint.replies.append((503, {"Retry-After": "soon"}, "down"))
    with pytest.raises(JudgeError, match="failed 3 times, the last with HTTP 503: down"):
        ask(endpoint)


def test_a_refusal_is_not_retried(endpoint):
    endpoint.replies.append((401, {}, "who are you?"))
    with pytest.raises(JudgeError, match="401"):
        ask(endpoint)
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("body", ["not json", {"choices": []}, {"choices": None}, ["x"]])
def test_what_is_no_completion_is_an_error(endpoint, body):
    endpoint.replies.append((200, {}, body))
    with pytest.raises(JudgeError, match="not a chat completion"):
        ask(endpoint)


def test_a_judge_that_is_not_there_is_no_verdict():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port
    judge = judged(LLMJudge(f"http://127.0.0.1:{port}/v1", "judge", retries=1, wait_s=0.001))
    verdict = asyncio.run(judge(PROMPT, Generated((), (), (), text="x")))
    assert verdict.reward is None
    assert "failed 2 times" in verdict.reason
