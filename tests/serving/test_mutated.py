"""Mutated requests over a real socket: each is answered or refused with one line, and none is an internal error."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lambdascale.live.serving.openai_api import ChatBody, CompletionBody
from lambdascale.live.serving.text import Text
from tests.serving.harness import Running, post, status_of

REFUSED = {400, 401, 403, 404, 405, 408, 413, 415, 421, 431, 501}
BODY: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
DEEP = 100_000


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No stranger writes to the log: neither a traceback nor a warning."""
    with caplog.at_level(logging.WARNING):
        yield
    assert not [record for record in caplog.records if record.name.startswith(("uvicorn", "asyncio"))], caplog.text


@pytest.fixture(scope="module")
def roomy(text: Text) -> Iterator[Running]:
    """A server whose bodies may be long."""
    running = Running(text, slot_tokens=16384)
    yield running
    running.close()


def ask(running: Running, body: bytes, path: bytes = b"/v1/completions") -> tuple[int, str]:
    """The status, and the message of an error, which is one line."""
    answer = running.say(post(body, b"Connection: close", path=path))
    status, content = status_of(answer), answer.partition(b"\r\n\r\n")[2]
    assert status == 200 or status in REFUSED, answer
    if status == 200:
        return status, ""
    message: str = json.loads(content)["error"]["message"]
    assert message
    assert "\n" not in message
    return status, message


def of(field: str, value: bytes) -> bytes:
    return b'{"model": "tiny", "prompt": "a", "%s": %s}' % (field.encode(), value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"[" * DEEP, ""),
        (b"[" * DEEP + b"]" * DEEP, ""),
        (b'{"model":' * 20_000, ""),
        (of("prompt", b"[" * DEEP + b"]" * DEEP), "prompt"),
        (of("logit_bias", b'{"a":' * 20_000 + b"1" + b"}" * 20_000), "logit_bias"),
        (of("stop", b"[" * DEEP), ""),
        (b"", ""),
        (b"null", ""),
        (b"\xff\xfe", ""),
        (b'{"model": "tiny", "prompt": "\xc3\x28"}', ""),
        (b'{"model": "tiny", "prompt": "\\ud800"}', ""),
        (b'{"model": "tiny", "prompt": "\\udc00\\ud800"}', ""),
        (b'{"model": "tiny", "prompt": "a"} {}', ""),
        (of("temperature", b"NaN"), ""),
        (of("temperature", b"Infinity"), ""),
        (of("temperature", b"1e999"), "temperature"),
        (of("temperature", b"-1"), "temperature"),
        (of("temperature", b"true"), "temperature"),
        (of("top_p", b"0"), "top_p"),
        (of("top_p", b"1.0000001"), "top_p"),
        (of("max_tokens", b"9" * 5000), "max_tokens"),
        (of("max_tokens", b"1e300"), "max_tokens"),
        (of("max_tokens", b"0"), "max_tokens"),
        (of("max_tokens", b"9223372036854775807"), "maximum context length"),
        (of("seed", b"9223372036854775808"), "seed"),
        (of("prompt", b"[-1]"), "token ids"),
        (of("prompt", b"[99999999999999999999999999]"), ""),
        (of("prompt", b"[[]]"), "no tokens"),
        (of("prompt", b'["", "a"]'), "no tokens"),
        (of("prompt", b"[" + b'"a",' * 128 + b'"a"]'), "128 prompts at most, not 129"),
        (of("stop", b'""'), "stop"),
        (of("stop", b'["a","b","c","d","e"]'), "stop"),
        (of("stream_options", b'{"include_usage": true}'), "stream_options"),
        (of("a", b'"\\u0000"'), "a is not supported"),
    ],
)
def test_absurd_bodies(roomy: Running, body: bytes, says: str) -> None:
    status, message = ask(roomy, body)
    assert status == 400
    assert says in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_tokens", 8),
        ("n", 2),
        ("best_of", 3),
        ("echo", True),
        ("logprobs", 0),
        ("logprobs", 5),
        ("logprobs", True),
        ("suffix", "x"),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("repetition_penalty", 1.1),
        ("top_k", 5),
        ("min_p", 0.1),
        ("logit_bias", {"5": 1}),
        ("guided_json", {}),
        ("prompt_logprobs", 1),
        ("whatever", None),
    ],
)
def test_a_parameter_that_is_not_honoured_is_refused_by_name(shared: Running, field: str, value: Any) -> None:
    with shared.client() as client:
        error = client.post("/v1/completions", json=BODY | {field: value})
    assert error.status_code == 400
    assert field in error.json()["error"]["message"]
    assert error.json()["error"]["param"] == field


def test_parameters_that_change_nothing(shared: Running) -> None:
    neutral = {"min_tokens": 0, "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": "", "frequency_penalty": 0}
    more = {"presence_penalty": 0.0, "repetition_penalty": 1.0, "top_k": -1, "min_p": 0, "logit_bias": {}, "user": "somebody"}
    with shared.client() as client:
        assert client.post("/v1/completions", json=BODY | neutral | more).status_code == 200
        chat = CHAT | {"logprobs": False, "top_logprobs": 0}
        chat["messages"] = [{"role": "assistant", "content": "b", "refusal": None, "tool_calls": None}, *CHAT["messages"]]
        assert client.post("/v1/chat/completions", json=chat).status_code == 200


def test_two_limits(shared: Running) -> None:
    with shared.client() as client:
        assert client.post("/v1/completions", json=BODY | {"max_completion_tokens": 2}).status_code == 200
        assert client.post("/v1/completions", json=BODY | {"max_completion_tokens": 3}).status_code == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__, "x"} - {"stream"})
FEW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@FEW
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
def test_fields_of_any_type(shared: Running, changes: dict[str, Any], path: str) -> None:
    base = CHAT if "chat" in path else BODY
    ask(shared, json.dumps(base | changes).encode(), path.encode())


@FEW
@given(st.data())
def test_damaged_json(shared: Running, data: st.DataObject) -> None:
    """Bytes of a good body replaced, dropped, repeated."""
    body = bytearray(json.dumps(data.draw(st.sampled_from([BODY, CHAT]))).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        body = body or bytearray(b" ")
    ask(shared, bytes(body), data.draw(st.sampled_from([b"/v1/completions", b"/v1/chat/completions"])))


@FEW
@given(st.data())
def test_damaged_requests(hasty: Running, data: st.DataObject) -> None:
    """The same with the whole request: what is said to be the length is not, headers are torn, and so on."""
    request = bytearray(post(json.dumps(BODY).encode(), b"Connection: close"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(request) - 1))
        request[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        request = request or bytearray(b"\r")
    answer = hasty.say(bytes(request))
    assert not answer or status_of(answer) == 200 or status_of(answer) in REFUSED, answer


@FEW
@given(st.lists(st.tuples(st.from_regex(rb"[A-Za-z-]{1,12}", fullmatch=True), st.binary(max_size=12)), max_size=5))
def test_headers_of_any_kind(hasty: Running, headers: list[tuple[bytes, bytes]]) -> None:
    lines = [name + b": " + value.replace(b"\n", b"").replace(b"\r", b"") for name, value in headers]
    answer = hasty.say(b"\r\n".join([b"GET /health HTTP/1.1", b"Host: localhost", *lines, b"Connection: close", b"", b""]))
    assert not answer or status_of(answer) == 200 or status_of(answer) in REFUSED, answer
