"""A server on a real socket over a scripted cluster: no nodes, no model, and answers when the test says so."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx

from lambdascale.core import Request
from lambdascale.inference.batch import Ticket
from lambdascale.live.controller.answers import Sink
from lambdascale.live.serving.frontend import FrontEnd
from lambdascale.live.serving.options import HttpOptions, bind
from lambdascale.live.serving.server import _Server
from lambdascale.live.serving.state import ClusterState
from lambdascale.live.serving.text import Text

PATIENCE_S = 20.0


class Cluster:
    """Takes requests; answers each with ``max_tokens`` tokens at once, or, held, when it is told to."""

    def __init__(self) -> None:
        self.held = False
        self.offered: dict[int, tuple[Ticket, Sink]] = {}  # and not ended
        self.order: list[Ticket] = []
        self.aborted: list[int] = []

    def now(self) -> float:
        return 1.0

    def offer(self, request: Request, ticket: Ticket, sink: Sink) -> None:
        self.order.append(ticket)
        self.offered[ticket.request_id] = (ticket, sink)
        if not self.held:
            self.answer(ticket.request_id)

    def answer(self, request_id: int) -> None:
        ticket, sink = self.offered.pop(request_id)
        for number in range(ticket.max_tokens):
            sink.tokens([65 + number % 26], number == ticket.max_tokens - 1)

    def abort(self, request_id: int) -> None:
        self.aborted.append(request_id)
        self.offered.pop(request_id, None)


class _Threaded(_Server):
    """Signals belong to the main thread, and this server to another."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Running:
    """A running server."""

    def __init__(self, text: Text, *, slot_tokens: int = 64, window: int = 40, **options: Any) -> None:
        self.options = HttpOptions(port=0, **options)
        self.cluster, self.state = Cluster(), ClusterState(8)
        self.front_end = FrontEnd(
            model="tiny",
            text=text,
            cluster=self.cluster,
            state=self.state,
            options=self.options,
            slot_tokens=slot_tokens,
            window=window,
            closed=lambda: "",
            ill=lambda: "",
            unready=lambda: "",
        )
        bound = bind(self.options)
        self.port = int(bound.getsockname()[1])
        service: Any = SimpleNamespace(front_end=self.front_end, ill=lambda: "", unready=lambda: "", stop_answering=lambda: None)
        self.server = _Threaded(service, self.options, bound)
        self._thread = threading.Thread(target=self._serve, name="http-server")
        self._thread.start()
        until(lambda: self.server.started and bool(self.server.servers))

    def _serve(self) -> None:
        asyncio.run(self.server.serve())

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def client(self, **options: Any) -> httpx.Client:
        scheme = "https" if self.options.tls_cert else "http"
        return httpx.Client(base_url=f"{scheme}://localhost:{self.port}", timeout=PATIENCE_S, **options)

    def metrics(self) -> dict[str, float]:
        """All metrics by name and labels, without those of the exposition itself."""
        with self.client() as client:
            text = client.get("/metrics").text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def refusals(self, status: int, reason: str) -> float:
        return self.metrics().get(f'lambdascale_refusals_total{{reason="{reason}",status="{status}"}}', 0.0)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def say(self, data: bytes) -> bytes:
        """Send bytes, and return all that comes until the server closes the connection."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join(PATIENCE_S)
        self.front_end._tokenizers.shutdown()


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def status_of(answer: bytes) -> int:
    """The status of the first response."""
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer[9:12])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/completions") -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: localhost", b"Content-Length: %d" % len(body), *headers, b"", body]
    return b"\r\n".join(lines)
