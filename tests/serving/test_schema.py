"""Whatever fits the OpenAPI document, and much that does not, gets an answer that is no server error."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

WAYS = (
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("PUT", "/api"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/admin/weights"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/admin/stats"),
    ("GET", "/metrics"),
    ("GET", "/health"),
    ("GET", "/"),
)


@pytest.fixture(scope="module")
def document(live):
    return httpx.get(f"{live.url}/openapi.json").json()


def test_the_document_names_every_way(document):
    ways = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert ways == set(WAYS)
    refs = str(document).split("'$ref': '#/components/schemas/")[1:]
    assert {ref.split("'")[0] for ref in refs} <= document["components"]["schemas"].keys()


def send_many(live, document, method: str, path: str, count: int) -> set[int]:
    """The statuses of `count` requests that fit the document, and as many that do not."""
    operation, statuses = schemathesis.openapi.from_dict(document)[path][method], set()

    def send(case) -> None:
        answer = case.call(base_url=live.url, timeout=60)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, f"{answer.text[:500]}\n{case.as_curl_command()[:2000]}"
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    limits = settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if method != "GET" else [])]
    for mode in modes:
        limits(given(operation.as_strategy(generation_mode=mode))(send))()
    return statuses


@pytest.mark.parametrize(("method", "path"), WAYS)
def test_no_server_error(live, document, method, path):
    assert send_many(live, document, method, path, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), WAYS[:6])
def test_no_server_error_in_many_tries(live, document, method, path):
    assert 400 in send_many(live, document, method, path, 60)
