"""Who may ask, and how much."""

import asyncio

import httpx
import openai
import pytest

from raytron.config import ServeConfig
from raytron.serving.limits import Bucket, Caller, Limits
from raytron.serving.protocol import Refused
from tests.serving.conftest import serving

ASK = {"model": "tiny", "prompt": "x", "max_tokens": 2}
PATHS = ("/", "/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny", "/nothing", "/admin/stats")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_lets_through_its_rate_whatever_the_pattern():
    clock = Clock()
    bucket, passed = Bucket(60, 1.0, clock), 0
    for _ in range(6000):  # ten tries a second for ten minutes
        if bucket.wait_s() == 0:
            bucket.take(1)
            passed += 1
        clock.now += 0.1
    assert passed == pytest.approx(60 + 600, abs=2)


def test_who_waits_as_long_as_told_gets_in():
    clock = Clock()
    bucket = Bucket(100, clock=clock)
    bucket.take(350)  # more than it ever holds, once
    wait = bucket.wait_s()
    assert wait == pytest.approx(150, abs=1e-6)
    clock.now = wait - 0.1
    assert bucket.wait_s() > 0
    clock.now = wait + 1e-6
    assert bucket.wait_s() == 0


def test_callers_do_not_share_and_are_forgotten_in_the_end(monkeypatch):
    monkeypatch.setattr("raytron.serving.limits.MOST_CALLERS", 100)
    limits = Limits(ServeConfig(requests_per_minute=1), Clock())
    for i in range(1000):
        limits.admit(Caller(str(i)))
    with pytest.raises(Refused) as refused:
        limits.admit(Caller("999"))
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "60")
    assert len(limits._buckets) == 100


@pytest.fixture(scope="module")
def guarded(model_path):
    with serving(model_path, ServeConfig(port=0, api_keys=("red", "blå"), admin_key="gold")) as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
def test_everything_needs_a_key(guarded, path):
    wrong = ({}, {"Authorization": "Bearer green"}, {"Authorization": "Bearer"}, {"Authorization": "Basic !"})
    for headers in (*wrong, {"Authorization": "red"}, {"Authorization": b"Bearer \xff\xfe"}):
        answer = httpx.get(guarded.url + path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
        assert httpx.request(method, guarded.url + path).status_code == 401


def test_health_needs_none(guarded):
    assert httpx.get(f"{guarded.url}/health").status_code == 200


@pytest.mark.parametrize("key", ["red", "blå", "gold"])
def test_a_right_key_is_let_in(guarded, key):
    headers = {"Authorization": b"Bearer " + key.encode()}
    assert httpx.post(f"{guarded.url}/v1/completions", json=ASK, headers=headers).status_code == 200
    for path in PATHS[:5]:
        assert httpx.get(guarded.url + path, headers=headers).status_code == 200


def test_a_browser_opens_the_page_with_a_password(guarded):
    refused = httpx.get(guarded.url)
    assert refused.headers["www-authenticate"].startswith("Basic")
    assert httpx.get(guarded.url, auth=("anyone", "red")).status_code == 200


def test_admin_is_for_the_admin_key(guarded):
    change = {"path": guarded.path}
    for headers in ({"Authorization": "Bearer red"}, {}):
        assert httpx.post(f"{guarded.url}/admin/weights", json=change, headers=headers).status_code == 401
    assert httpx.get(f"{guarded.url}/admin/stats", auth=("anyone", "gold")).status_code == 401  # a browser's form
    answer = httpx.get(f"{guarded.url}/admin/stats", headers={"Authorization": "Bearer gold"})
    assert answer.json()["models"]["tiny"][0]["health"] == "ready"


def test_without_an_admin_key_admin_is_closed_to_key_holders_and_to_web_pages(model_path, live):
    with serving(model_path, ServeConfig(port=0, api_keys=("red",))) as server:
        headers = {"Authorization": "Bearer red"}
        assert httpx.get(f"{server.url}/admin/stats", headers=headers).status_code == 403
    assert httpx.get(f"{live.url}/admin/stats").status_code == 200
    assert httpx.get(f"{live.url}/admin/stats", headers={"Origin": "http://evil"}).status_code == 403


def test_the_openai_client_sees_a_wrong_key(guarded):
    with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
        guarded.client("green").completions.create(**ASK)


def test_requests_per_minute(model_path):
    config = ServeConfig(port=0, api_keys=("red", "blue"), admin_key="gold", requests_per_minute=3)
    with serving(model_path, config) as server:
        red, blue, gold = (server.client(key) for key in ("red", "blue", "gold"))
        for _ in range(3):
            red.completions.create(**ASK)
        with pytest.raises(openai.RateLimitError) as refused:
            red.completions.create(**ASK)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "rate_limit_exceeded"
        assert red.models.list().data  # only what costs is counted
        blue.completions.create(**ASK)
        for _ in range(5):
            gold.completions.create(**ASK)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_per_minute(model_path, stream):
    with serving(model_path, ServeConfig(port=0, tokens_per_minute=50)) as server:
        client = server.client()
        ask = {"model": "tiny", "prompt": "x" * 20, "max_tokens": 40, "stream": stream}
        list(client.completions.create(**ask))
        with pytest.raises(openai.RateLimitError, match="50 tokens a minute"):
            client.completions.create(**ask)


def test_a_full_queue_is_429_and_the_rest_are_answered(model_path):
    config = ServeConfig(port=0, max_queue=4)
    with serving(model_path, config, max_num_seqs=2) as server:

        async def ask_all() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=100)
            async with httpx.AsyncClient(timeout=60, limits=limits) as http:
                ask = {**ASK, "max_tokens": 100}
                return await asyncio.gather(*(http.post(f"{server.url}/v1/completions", json=ask) for _ in range(60)))

        answers = asyncio.run(ask_all())
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert all(int(a.headers["retry-after"]) >= 1 and a.json()["error"]["code"] == "overloaded" for a in refused)
        assert {answer.status_code for answer in answers} == {200, 429}
        assert server.client().completions.create(**ASK).choices
