"""schemathesis against the description that the server itself provides, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.routing import Route

from lambdascale import __version__
from lambdascale.live.serving.text import Text
from tests.serving.harness import Running

KEY = "right"
OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/cluster"),
]
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    ignored_auth,
)


@pytest.fixture(scope="module")
def keyed(text: Text) -> Iterator[Running]:
    running = Running(text, api_keys=(KEY,), slot_tokens=256)
    yield running
    running.close()


@pytest.fixture(scope="module")
def headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def schema(keyed: Running, headers: dict[str, str]) -> Any:
    return schemathesis.openapi.from_url(f"http://localhost:{keyed.port}/openapi.json", headers=headers)


def test_every_route_is_described(keyed: Running, schema: Any) -> None:
    paths = schema.raw_schema["paths"]
    assert {(method.upper(), path) for path in paths for method in paths[path]} == {*OPERATIONS, ("GET", "/openapi.json")}
    routes = {route.path.replace(":path", "") for route in keyed.front_end._routes().routes if isinstance(route, Route)}
    assert set(paths) == routes
    assert schema.raw_schema["info"]["version"] == __version__


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_is_an_internal_error(
    keyed: Running, schema: Any, headers: dict[str, str], method: str, path: str, mode: Any
) -> None:
    """Answers are as described, and what is not described is refused."""
    operation = schema[path][method]
    if mode is schemathesis.GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters):
        return  # nothing to get wrong

    with requests.Session() as session:

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            case.call_and_validate(session=session, headers=headers, checks=CHECKS)

        check()


def test_a_described_request_is_answered(keyed: Running, schema: Any, headers: dict[str, str]) -> None:
    """Anything that the description allows is answered if its tokens fit."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "n": 1, "user": "x", "top_k": 0, "logit_bias": {}, "stop": ["x"]}
    with keyed.client(headers=headers) as client:
        assert client.post("/v1/completions", json=body).status_code == 200
    assert body.keys() <= schema.raw_schema["components"]["schemas"]["CompletionBody"]["properties"].keys()
