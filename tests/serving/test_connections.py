"""Raw sockets: half requests, slow ones, oversize ones, too many connections, clients that do not read."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from lambdascale.live.serving import limits
from lambdascale.live.serving.options import HEAD_BYTES
from tests.serving.harness import PATIENCE_S, Running, post, read_all, status_of, until

Start = Callable[..., Running]
BODY = b'{"model": "tiny", "prompt": "a", "max_tokens": 2}'


def error_of(answer: bytes) -> str:
    """The message of an error's response: one line."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head, answer
    said: str = json.loads(body)["error"]["message"]
    assert "\n" not in said
    return said


def drip(connection: socket.socket, piece: bytes) -> None:
    """Send a piece now and then, until the server ends the connection."""
    deadline = time.monotonic() + PATIENCE_S
    with suppress(ConnectionError):
        while True:
            assert time.monotonic() < deadline, "it goes on for ever"
            connection.sendall(piece)
            time.sleep(0.05)


class TestIncomplete:
    """Requests that do not come whole, refused within ``receive_timeout_s`` (half a second here)."""

    @pytest.mark.parametrize(
        "begun",
        [
            b"G",
            b"GET / HT",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 1000,
            post(BODY)[:-1],
            post(BODY)[: -len(BODY)],
            b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"mod',
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n{",
        ],
    )
    def test_half_a_request(self, hasty: Running, begun: bytes) -> None:
        answer = hasty.say(begun)
        assert status_of(answer) == 408
        assert error_of(answer) == "the request did not come whole within 0.5 s"

    def test_silence(self, hasty: Running) -> None:
        assert hasty.say(b"") == b""

    def test_a_byte_at_a_time(self, hasty: Running) -> None:
        """Slowloris: what comes slowly does not move the deadline."""
        with hasty.connect() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            drip(connection, b"X: y\r\n")

    def test_a_chunked_body_that_never_ends(self, hasty: Running) -> None:
        with hasty.connect() as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            connection.settimeout(0.02)
            answer = b""
            while not answer:
                try:
                    connection.sendall(b"1\r\n \r\n" * 10)
                    answer = connection.recv(65536)
                except TimeoutError:
                    pass
            assert status_of(answer) == 408

    def test_a_body_that_nobody_wants_is_not_read_for_ever(self, hasty: Running) -> None:
        """The answer comes at once, and the connection is closed though bytes keep coming."""
        with hasty.connect() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n")
            assert status_of(connection.recv(65536)) == 200
            drip(connection, b"x")

    def test_they_are_counted(self, hasty: Running) -> None:
        before = hasty.refusals(408, "slow_request")
        hasty.say(b"GET")
        assert hasty.refusals(408, "slow_request") == before + 1


class TestMalformed:
    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (b"\x00\x01\x02\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n", 400),  # a TLS handshake
            (b"GET / HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\n bad: folded\r\nX\r\n\r\n", 400),
            (b"GET /" + b"a" * (HEAD_BYTES + 8192) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n", 431),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", 431),
            (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        ],
    )
    def test_it_is_refused_in_one_line(self, shared: Running, request_: bytes, status: int) -> None:
        answer = shared.say(request_)
        assert status_of(answer) == status
        assert error_of(answer)

    def test_rubbish_behind_a_request(self, shared: Running) -> None:
        """The request is answered, the rubbish refused."""
        answer = shared.say(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n\x00\x01rubbish\r\n\r\n")
        assert status_of(answer) == 200
        assert b"HTTP/1.1 400" in answer

    def test_rubbish_in_a_stream(self, start: Start) -> None:
        """Rubbish ends the connection, and the request with it."""
        running = start()
        running.cluster.held = True
        with running.connect() as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            connection.sendall(b"%x\r\n%s\r\nrubbish\r\n" % (len(BODY), BODY))
            assert status_of(read_all(connection)) == 400
        assert not running.cluster.offered

    def test_pipelined_requests_are_answered_in_order(self, shared: Running) -> None:
        last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = shared.say(post(BODY) + b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n" + last)
        assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 404, 200]


class TestMany:
    @pytest.fixture
    def sockets(self) -> Iterator[ExitStack]:
        """Sockets that are closed at the end."""
        with ExitStack() as stack:
            yield stack

    def test_the_newest_connection_is_refused_if_all_others_are_at_work(self, start: Start, sockets: ExitStack) -> None:
        running = start(connections=3)
        running.cluster.held = True
        busy = [sockets.enter_context(running.connect()) for _ in range(3)]
        for connection in busy:
            connection.sendall(post(BODY))
        until(lambda: len(running.cluster.offered) == 3)
        answer = running.say(b"")
        assert status_of(answer) == 503
        assert b"Retry-After: 1\r\n" in answer
        assert error_of(answer) == "the server has too many connections"
        for number in list(running.cluster.offered):
            running.cluster.answer(number)
        for connection in busy:
            assert status_of(connection.recv(65536)) == 200

    def test_idle_connections_make_room(self, start: Start, sockets: ExitStack) -> None:
        """Clients that open connections and say nothing keep nobody out."""
        running = start(connections=4)
        for _ in range(4):
            sockets.enter_context(running.connect())
        until(lambda: running.connections == 4)
        with running.client() as client:
            assert client.post("/v1/completions", content=BODY).status_code == 200
        assert running.connections <= 4
        assert running.refusals(0, "displaced") >= 1

    def test_a_flood(self, start: Start, sockets: ExitStack) -> None:
        """A flood uses up neither descriptors nor answers."""
        running = start(connections=16)
        for _ in range(400):
            sockets.enter_context(running.connect())
        with running.client() as client:
            assert client.get("/health").status_code == 200
        assert running.connections <= 16 + 129


def test_bodies_have_a_bound_together(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds for any number of connections; bytes are free again when a client has left."""
    monkeypatch.setattr(limits, "BODIES_BYTES", 0)
    running = start()
    half = b" " * (running.front_end._limits.body_bytes * 6 // 10)
    with running.connect() as first:
        first.sendall(post(half + BODY)[: -len(BODY)])
        until(lambda: running.front_end._limits.held == len(half))
        answer = running.say(post(half + BODY, b"Connection: close"))
        assert status_of(answer) == 503
        assert b"retry-after: 1\r\n" in answer.lower()
    until(lambda: running.front_end._limits.held == 0)
    assert status_of(running.say(post(half + BODY, b"Connection: close"))) == 200
    assert running.refusals(503, "bodies") == 1


class TestReaders:
    LONG = b'{"model": "tiny", "prompt": "a", "max_tokens": 60000, "stream": true, "ignore_eos": true}'

    def test_one_that_does_not_read_is_cut_off(self, start: Start) -> None:
        """The client's memory is bounded by what it asked for, its time by ``send_timeout_s``."""
        running = start(slot_tokens=65536, send_timeout_s=0.5)
        with running.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(post(self.LONG))
            until(lambda: bool(running.cluster.order))
            until(lambda: running.connections == 0)
        assert running.front_end.admission.started == 0
        assert running.metrics()['lambdascale_failures_total{reason="client_left"}'] == 1

    def test_one_that_does_not_read_keeps_nobody_waiting(self, start: Start) -> None:
        """The client's place is free as soon as the cluster has answered."""
        running = start(slot_tokens=65536, window=1)
        with running.connect() as connection, running.client() as client:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(post(self.LONG))
            until(lambda: bool(running.cluster.order))
            assert client.post("/v1/completions", content=BODY).status_code == 200
            assert running.front_end.admission.started == 0
            assert running.connections == 2

    def test_one_that_reads_has_all_of_it(self, start: Start) -> None:
        running = start(slot_tokens=65536, send_timeout_s=5.0)
        answer = running.say(post(self.LONG.replace(b"60000", b"9000"), b"Connection: close"))
        assert answer.count(b"data: ") == 9_001
        assert b"data: [DONE]" in answer
