"""The front end over a scripted cluster: what it refuses, what it answers, and what it does meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from lambdascale.core import Failure, Request
from lambdascale.core.events import NodeJoined
from lambdascale.inference.batch import Ticket
from lambdascale.live.controller.answers import Sink
from lambdascale.live.serving import limits
from lambdascale.live.serving.frontend import FrontEnd
from lambdascale.live.serving.limits import Limits
from lambdascale.live.serving.options import HttpOptions
from lambdascale.live.serving.state import ClusterState
from lambdascale.live.serving.text import Text
from tests.live.harness import pack_tiny

SLOT_TOKENS = 64


class Cluster:
    """Answers every request with two tokens, or fails it."""

    def __init__(self) -> None:
        self.offered: list[Ticket] = []
        self.aborted: list[int] = []
        self.failure: Failure | None = None
        self.begun = False  # fail after a token

    def now(self) -> float:
        return 1.0

    def offer(self, request: Request, ticket: Ticket, sink: Sink) -> None:
        self.offered.append(ticket)
        if self.begun:
            sink.tokens([65], False)
        if self.failure is not None:
            sink.failed(self.failure)
        else:
            sink.tokens([65, 66], True)

    def abort(self, request_id: int) -> None:
        self.aborted.append(request_id)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    directory: Path = pack_tiny(tmp_path_factory.mktemp("frontend"))
    return Text(directory)


class Served:
    """A front end and a client that speaks to it without a socket."""

    def __init__(self, text: Text) -> None:
        self.cluster, self.state = Cluster(), ClusterState(8)
        self.closed = self.ill = self.unready = ""
        self.front_end = FrontEnd(
            model="tiny",
            text=text,
            cluster=self.cluster,
            state=self.state,
            options=HttpOptions(),
            slot_tokens=SLOT_TOKENS,
            window=40,
            closed=lambda: self.closed,
            ill=lambda: self.ill,
            unready=lambda: self.unready,
        )
        self.limits = Limits(slot_tokens=SLOT_TOKENS, longest_token=text.longest_token)

    def run(self, act: Callable[[httpx.AsyncClient], Coroutine[Any, Any, httpx.Response]]) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(self.front_end.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await act(client)

        return asyncio.run(main())

    def get(self, path: str) -> httpx.Response:
        return self.run(lambda client: client.get(path))

    def ask(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.run(lambda client: client.post(path, json={"model": "tiny", "max_tokens": 4} | body))


@pytest.fixture
def served(text: Text) -> Iterator[Served]:
    made = Served(text)
    yield made
    made.front_end._tokenizers.shutdown()


def error(answer: httpx.Response) -> dict[str, Any]:
    said: dict[str, Any] = answer.json()["error"]
    return said


def message(answer: httpx.Response) -> str:
    return str(error(answer)["message"])


class TestSampling:
    @pytest.mark.parametrize("seed", [1 << 63, -(1 << 63) - 1, 10**30])
    def test_a_seed_outside_64_bits(self, served: Served, seed: int) -> None:
        answer = served.ask(prompt="a", seed=seed)
        assert answer.status_code == 400
        assert "seed" in message(answer)
        assert not served.cluster.offered

    @pytest.mark.parametrize("seed", [(1 << 63) - 1, -(1 << 63), 0])
    def test_a_seed_of_64_bits(self, served: Served, seed: int) -> None:
        assert served.ask(prompt="a", seed=seed).status_code == 200
        assert served.cluster.offered[0].sampling.seed == seed

    @pytest.mark.parametrize(("asked", "used"), [(1e-300, 0.01), (0.00999, 0.01), (0, 0.0), (0.01, 0.01), (0.7, 0.7)])
    def test_small_temperatures(self, served: Served, asked: float, used: float) -> None:
        assert served.ask(prompt="a", temperature=asked).status_code == 200
        assert served.cluster.offered[0].sampling.temperature == used


class TestBounds:
    """Bounds of a body."""

    def test_a_declared_length_is_refused_unread(self, served: Served) -> None:
        """The body is not taken, not a byte of it, if the client asks first."""
        taken: list[int] = []

        async def body() -> AsyncIterator[bytes]:
            taken.append(1)
            yield b"{}"

        headers = {"Content-Length": str(served.limits.body_bytes + 1), "Expect": "100-continue"}
        answer = served.run(lambda client: client.post("/v1/completions", content=body(), headers=headers))
        assert answer.status_code == 413
        assert str(served.limits.body_bytes) in message(answer)

    def test_an_undeclared_length_is_refused_while_reading(self, served: Served) -> None:
        """The rest is dropped, and not without end."""
        piece, given = b" " * 65536, 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal given
            while given < 10 * limits.DROPPED_BYTES:
                given += len(piece)
                yield piece

        async def post() -> int:
            messages: list[dict[str, Any]] = []
            parts = body()

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": await anext(parts), "more_body": True}

            async def send(message: Any) -> None:
                messages.append(message)

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
            await served.front_end.app(scope, receive, send)
            return int(messages[0]["status"])

        assert asyncio.run(post()) == 413
        assert given <= served.limits.body_bytes + limits.DROPPED_BYTES + len(piece)

    def test_a_client_that_sends_all_first_hears_why_it_is_refused(self, served: Served) -> None:
        """The client is not cut off while it sends."""
        answer = served.ask(prompt="a" * (served.limits.body_bytes + 1))
        assert answer.status_code == 413
        assert "bytes at most" in message(answer)

    def test_the_longest_body_is_read(self, served: Served) -> None:
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
        padded = body + b" " * (served.limits.body_bytes - len(body))
        assert served.run(lambda client: client.post("/v1/completions", content=padded)).status_code == 200

    def test_a_prompt_that_cannot_fit_is_not_cut_into_tokens(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Text, "encode", lambda *_, **__: pytest.fail("it is cut"))
        answer = served.ask(prompt="a" * (served.limits.characters + 1))
        assert answer.status_code == 400
        assert str(served.limits.characters) in message(answer)
        chat = [{"role": "user", "content": "a" * (served.limits.characters + 1)}]
        answer = served.ask("/v1/chat/completions", messages=chat)
        assert answer.status_code == 400

    def test_the_longest_prompts_are_cut_into_tokens(self, served: Served) -> None:
        """The bound on characters refuses nothing that fits."""
        answer = served.ask(prompt="a" * (SLOT_TOKENS - 4))
        assert answer.status_code == 200
        answer = served.ask(prompt="a" * served.limits.characters)
        assert "maximum context length" in message(answer)

    @pytest.mark.parametrize(("count", "status"), [(128, 200), (129, 400)])
    def test_the_number_of_prompts(self, served: Served, count: int, status: int) -> None:
        assert served.ask(prompt=["a"] * count).status_code == status

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    def test_the_event_loop_goes_on_while_a_prompt_is_cut(
        self, served: Served, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The tokenizer waits for an answer of the same event loop."""
        other = threading.Event()
        encode = Text.encode

        def slow(self: Text, text: str, **options: Any) -> list[int]:
            assert other.wait(20), "the event loop is blocked"
            return encode(self, text, **options)

        monkeypatch.setattr(Text, "encode", slow)
        body: dict[str, Any] = {"model": "tiny", "max_tokens": 4}
        body |= {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}

        async def both(client: httpx.AsyncClient) -> httpx.Response:
            asked = asyncio.create_task(client.post(path, json=body))
            await asyncio.sleep(0)
            for _ in range(10):
                assert (await client.get("/health")).status_code == 200
            other.set()
            return await asked

        assert served.run(both).status_code == 200


class TestConditions:
    def test_alive_and_ready(self, served: Served) -> None:
        assert [served.get(path).status_code for path in ("/health", "/ready")] == [200, 200]

    def test_alive_and_not_ready(self, served: Served) -> None:
        served.unready = "tiny is being loaded"
        assert served.get("/health").status_code == 200
        answer = served.get("/ready")
        assert answer.status_code == 503
        assert answer.json() == {"status": "unavailable", "reason": "tiny is being loaded"}
        assert served.ask(prompt="a").status_code == 200

    def test_not_alive(self, served: Served) -> None:
        served.ill = "no node is alive"
        for path in ("/health", "/ready"):
            assert served.get(path).status_code == 503
            assert served.get(path).json()["reason"] == "no node is alive"
        assert served.ask(prompt="a").status_code == 200, "it waits for a node that is started again"

    def test_closed(self, served: Served) -> None:
        served.closed = "no node is alive"
        assert message(served.ask(prompt="a")) == "no node is alive"
        assert not served.cluster.offered


class TestFailures:
    """A request that the cluster gives up reaches its client as an error, by its reason, whatever the words."""

    FAILURE = Failure("instance_failed", "no node is left: the server is stopping")
    ERROR: ClassVar = {"message": FAILURE.text, "type": "server_error", "param": None, "code": "instance_failed"}

    def test_a_whole_answer(self, served: Served) -> None:
        served.cluster.failure = self.FAILURE
        answer = served.ask(prompt="a")
        assert answer.status_code == 503
        assert error(answer) == self.ERROR

    def test_a_stream_that_has_not_begun(self, served: Served) -> None:
        """An error before the first event has a status of its own: clients and proxies may ask again."""
        served.cluster.failure = self.FAILURE
        answer = served.ask(prompt="a", stream=True)
        assert answer.status_code == 503
        assert error(answer) == self.ERROR

    def test_a_stream_that_has_begun(self, served: Served) -> None:
        served.cluster.failure, served.cluster.begun = self.FAILURE, True
        answer = served.ask(prompt="a", stream=True)
        assert answer.status_code == 200
        _, event = answer.text.strip().split("\n\n")
        assert json.loads(event.removeprefix("data: "))["error"] == self.ERROR
        assert 'lambdascale_failures_total{reason="instance_failed"} 1.0' in served.get("/metrics").text

    def test_refusals_are_counted(self, served: Served) -> None:
        served.state.on_event(NodeJoined(0.0, 0))
        served.ask(prompt="a", seed=1 << 64)
        served.ask(prompt="a", n=2)
        served.ask(prompt="a", model="other")
        metrics = served.get("/metrics").text
        assert 'lambdascale_refusals_total{reason="bad_request",status="400"} 2.0' in metrics
        assert 'lambdascale_refusals_total{reason="unknown_model",status="404"} 1.0' in metrics
