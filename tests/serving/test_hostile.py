"""What the network may send: refused with a reason, memory flat, everyone else served as if nothing had happened."""

import asyncio
import json
import os
import resource
import socket
import time
from contextlib import closing, contextmanager

import httpx
import pytest

from raytron.config import ServeConfig
from tests.serving.conftest import serving

ASK = {"model": "tiny", "prompt": "x", "max_tokens": 3}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@contextmanager
def connected(url: str):
    """A bare connection."""
    host, port = url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=60)) as connection:
        yield connection


def answer(connection: socket.socket) -> tuple[int, dict]:
    """Status and JSON of an answer after which the server hangs up."""
    received = b""
    while part := connection.recv(65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def still_serves(server) -> None:
    assert httpx.post(f"{server.url}/v1/completions", json=ASK).status_code == 200


def memory_mb() -> float:
    """Of this process, in which the server runs."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.fixture(scope="module")
def hasty(model_path):
    """A server with little patience."""
    config = ServeConfig(port=0, header_timeout_s=0.5, body_timeout_s=0.5, keep_alive_s=1, max_body_mb=1)
    with serving(model_path, config) as server:
        yield server


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "isn't JSON"),
        (b"hello", "isn't JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"prompt": "\xff"}', "isn't JSON"),
        (b'{"prompt": "\\ud800"}', "isn't JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "isn't JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", ""),
        (b'{"prompt": "x", "seed": 1' + b"0" * 30 + b"}", "seed"),
        (b'{"prompt": ' + b"[" * 100_000, "isn't JSON"),
        (b'{"prompt": [' + b"null," * 100_000 + b"null]}", "prompt"),
        (b'{"prompt": "x", "logit_bias": {' + b",".join(b'"%d": 0' % i for i in range(50_000)) + b"}}", "logit_bias"),
        (b"{" + b",".join(b'"k%d": 0' % i for i in range(50_000)) + b"}", "unknown field"),
        (b'{"prompt": "x", "structured_outputs": {"json": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}}", ""),
    ],
)
def test_bodies_that_are_none(live, body, says):
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/admin/weights"):
        got = httpx.post(live.url + path, content=body, headers=headers)
        assert got.status_code == 400
        assert path != "/v1/completions" or says in got.json()["error"]["message"]
        assert set(got.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.put(f"{live.url}/api", content=body, headers=headers).status_code == 400


@pytest.mark.parametrize("kind", [None, "text/plain", "multipart/form-data", "application/x-www-form-urlencoded"])
def test_bodies_of_another_kind(live, kind):
    headers = {"Content-Type": kind} if kind else {}
    got = httpx.post(f"{live.url}/v1/completions", content=json.dumps(ASK), headers=headers)
    assert got.status_code == 415
    assert "application/json" in got.json()["error"]["message"]


def test_ways_that_are_none(live):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/models/../../etc/passwd", 404),
        ("GET", "/%ff%fe", 404),
        ("GET", "/v1/models/" + "x" * 5000, 404),
    ):
        got = httpx.request(method, live.url + path, json={} if method == "POST" else None)
        assert got.status_code == status, path
        assert len(got.json()["error"]["message"]) < 500


def test_a_body_too_large_is_refused_before_it_is_sent(hasty):
    with connected(hasty.url) as connection:
        connection.sendall(f"{HEAD}Content-Length: 10000000\r\n\r\n".encode())
        status, body = answer(connection)
    assert (status, body["error"]["code"]) == (413, "body_too_large")


def test_a_body_that_grows_too_large_is_cut_off(hasty):
    with connected(hasty.url) as connection:
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with pytest.raises(OSError):  # noqa: PT012 - the hanging up comes when it comes
            for _ in range(10_000):  # 650 MB, if it were let
                connection.sendall(chunk)
    still_serves(hasty)


def test_large_bodies_leave_memory_as_it_was(live):
    text = json.dumps({**ASK, "prompt": "x" * 3_900_000})
    ids = json.dumps({**ASK, "prompt": [1] * 1_300_000})
    nulls = json.dumps({"messages": [None] * 700_000})
    tokens = json.dumps({"tokens": [1] * 1_300_000})
    too_large = json.dumps({**ASK, "prompt": "x" * 10_000_000})
    sent = (("/v1/completions", text), ("/v1/completions", ids), ("/v1/chat/completions", nulls))
    sent += (("/detokenize", tokens), ("/v1/completions", too_large))

    def send_all() -> set[int]:
        headers = {"Content-Type": "application/json"}
        return {httpx.post(live.url + p, content=b, headers=headers, timeout=60).status_code for p, b in sent}

    assert send_all() == {400, 413, 200}
    before = memory_mb()
    for _ in range(4):
        send_all()
    assert memory_mb() < before + 100
    still_serves(live)


def test_a_head_that_never_ends_is_cut_off(hasty):
    with connected(hasty.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        status, body = answer(connection)
    assert status == 408
    assert "head" in body["error"]["message"]
    with connected(hasty.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * 200_000)
        assert answer(connection)[0] == 431


def test_a_head_that_comes_byte_by_byte_is_cut_off(hasty):
    with connected(hasty.url) as connection:
        connection.settimeout(0.05)
        begun, received = time.monotonic(), b""
        for byte in b"GET /health HTTP/1.1\r\n" + b"X-A: b\r\n" * 1000:
            try:
                connection.send(bytes([byte]))
                received += connection.recv(1000)
                break
            except TimeoutError:
                continue
            except OSError:
                break
        assert received.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begun < 30


def test_a_body_that_never_comes_gets_408(hasty):
    with connected(hasty.url) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        status, body = answer(connection)
    assert status == 408
    assert "body" in body["error"]["message"]


def test_what_is_no_http_is_400(hasty):
    negative = b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"
    for junk in (b"\x16\x03\x01 hello\r\n\r\n", b"BREW /pot HTCPCP/1.0\r\n\r\n", negative):
        with connected(hasty.url) as connection:
            connection.sendall(junk)
            assert answer(connection)[0] == 400


def test_many_silent_connections_hinder_nobody(hasty):
    """Half of them never say anything, half begin to."""
    host, port = hasty.url.removeprefix("http://").split(":")

    async def flood() -> None:
        connections = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(300)))
        for _, writer in connections[::2]:
            writer.write(HEAD.encode())
        async with httpx.AsyncClient(timeout=30) as http:
            answers = await asyncio.gather(*(http.post(f"{hasty.url}/v1/completions", json=ASK) for _ in range(5)))
        assert {one.status_code for one in answers} == {200}
        ends = await asyncio.gather(*(reader.read() for reader, _ in connections))
        assert all(end.startswith(b"HTTP/1.1 408") for end in ends)
        for _, writer in connections:
            writer.close()

    asyncio.run(flood())


def test_too_many_connections_are_turned_away(model_path):
    with serving(model_path, ServeConfig(port=0, max_connections=3)) as server:
        held = [socket.create_connection(server.url.removeprefix("http://").split(":")) for _ in range(3)]
        with connected(server.url) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(connection)[0] == 503
        for connection in held:
            connection.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_no_descriptor_is_left(hasty):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    still_serves(hasty)
    before = count()
    for _ in range(50):
        with connected(hasty.url) as connection:
            connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    still_serves(hasty)
    deadline = time.monotonic() + 30
    while count() > before + 5 and time.monotonic() < deadline:
        still_serves(hasty)
    assert count() <= before + 5
