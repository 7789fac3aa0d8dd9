"""Whatever fits the OpenAPI document, and much that does not, gets an answer that is no server error."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error

PATHS = ("/v1/completions", "/v1/chat/completions", "/api", "/tokenize", "/detokenize", "/admin/weights")


@pytest.fixture(scope="module")
def document(live):
    return httpx.get(f"{live.url}/openapi.json").json()


def test_the_document_names_every_way(document):
    others = {"/", "/health", "/metrics", "/v1/models", "/v1/models/{model}", "/admin/stats"}
    assert others | set(PATHS) <= document["paths"].keys()
    refs = str(document).split("'$ref': '#/components/schemas/")[1:]
    assert {ref.split("'")[0] for ref in refs} <= document["components"]["schemas"].keys()


@pytest.fixture
def schema(live):
    found = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    found.config.base_url = live.url
    return found


lazy = schemathesis.pytest.from_fixture("schema")


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )


@lazy.parametrize()
@examples(15)
def test_no_server_error(case):
    case.call_and_validate(checks=[not_a_server_error], timeout=60)


@pytest.mark.slow
@lazy.parametrize()
@examples(300)
def test_no_server_error_in_many_tries(case):
    case.call_and_validate(checks=[not_a_server_error], timeout=60)
