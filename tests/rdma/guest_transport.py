"""Run in the guest: the conformance suite on real verbs with all kinds of connections, and faults that only verbs have."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lambdascale.testing.transports import Heard, Node, TransportConformance
from lambdascale.transport import Endpoint, Handlers, TokenBucket, TransportError
from lambdascale.transport.rdma import RdmaOptions, load
from lambdascale.transport.rdma.connection import RdmaConnection

KEY = b"k" * 32
RdmaEndpoint = load()


class Hospitable(RdmaEndpoint):
    """Admits every peer for as long as it is connected."""

    def _add(self, connection: RdmaConnection, generation: int, welcome: bytes = b"") -> None:
        super()._add(connection, generation, welcome)
        connection.admit()


class TestWindows(TransportConformance):
    """Connections with memory windows, as in the live cluster."""

    options = RdmaOptions()

    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return Hospitable(node, handlers, KEY, options=self.options)

    def break_off(self, endpoint: Endpoint) -> None:
        assert isinstance(endpoint, RdmaEndpoint)
        for connection in list(endpoint._connections.values()):
            connection.sock.shutdown(socket.SHUT_RDWR)


class TestTwoRails(TestWindows):
    options = RdmaOptions(devices=("rxe0", "rxe1"), chunk_bytes=64 << 10)


class TestStanding(TestWindows):
    options = RdmaOptions(windows=False)

    def break_off(self, endpoint: Endpoint) -> None:
        """Let a queue pair fail while the sockets stay open."""
        assert isinstance(endpoint, RdmaEndpoint)
        for connection in list(endpoint._connections.values()):
            connection.lanes[0].fail()


class TestPaced(TestWindows):
    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return Hospitable(node, handlers, KEY, link=TokenBucket(200e6))


class TestShallow(TestWindows):
    options = RdmaOptions(chunk_bytes=16 << 10, depth=2, windows=False)


@pytest.fixture
def two() -> Iterator[tuple[Node, Node]]:
    """Two connected endpoints, neither of which admits the other."""
    with ExitStack() as stack:
        nodes = []
        for number in range(2):
            heard = Heard()
            endpoint = RdmaEndpoint(number, heard.handlers(), KEY)
            stack.callback(endpoint.close)
            nodes.append(Node(endpoint, heard, 1 << 16))
        nodes[1].endpoint.connect(0, nodes[0].endpoint.address)
        yield nodes[1], nodes[0]


class TestKeys:
    """Peers write only while they are admitted."""

    def test_a_write_waits_until_it_is_admitted(self, two: tuple[Node, Node]) -> None:
        one, other = two
        data = random.Random(1).randbytes(5000)
        for round_ in range(3):
            future = one.endpoint.write(0, memoryview(data), 5000 * round_, round_)
            one.endpoint.send(0, b"ready").result(30)
            assert not future.done()
            other.endpoint.admit(1)
            future.result(30)
            other.heard.wait(lambda heard: len(heard.writes) == round_ + 1)  # noqa: B023 (called at once)
            other.endpoint.dismiss(1)
            other.endpoint.send(1, b"dismissed")
            one.heard.wait(lambda heard: len(heard.messages) == round_ + 1)  # noqa: B023 (called at once)
        assert other.memory[:15000] == data * 3

    def test_an_old_key_is_worth_nothing(self, two: tuple[Node, Node]) -> None:
        one, other = two
        other.endpoint.admit(1)
        one.endpoint.write(0, memoryview(b"welcome"), 0, 0).result(30)
        (connection,) = one.endpoint._connections.values()
        stale = list(connection._outbox.keys)
        other.endpoint.dismiss(1)
        other.endpoint.send(1, b"dismissed")
        one.heard.wait(lambda heard: bool(heard.messages))
        connection._outbox.keys = stale
        with pytest.raises(TransportError):
            one.endpoint.write(0, memoryview(b"intruder"), 100, 0).result(30)
        assert not any(other.memory[100:200])
        assert one.heard.lost


class TestFaults:
    """Faults that only verbs have end as any other loss of a connection."""

    @pytest.fixture
    def ends(self, two: tuple[Node, Node]) -> tuple[Node, RdmaConnection, RdmaConnection]:
        """The writer, which is admitted, its connection, and the other end's."""
        one, other = two
        other.endpoint.admit(1)
        one.endpoint.write(0, memoryview(b"welcome"), 0, 0).result(30)
        (writing,) = one.endpoint._connections.values()
        (reading,) = other.endpoint._connections.values()
        return one, writing, reading

    def lose(self, one: Node, says: str) -> None:
        future = one.endpoint.write(0, memoryview(b"in vain"), 0, 1)
        with pytest.raises(TransportError, match=says):
            future.result(60)
        one.heard.wait(lambda heard: bool(heard.lost))
        assert [peer for peer, _ in one.heard.lost] == [0]

    def test_a_peer_that_does_not_answer(
        self, ends: tuple[Node, RdmaConnection, RdmaConnection], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The peer's machine is lost: no packet is acknowledged, and no socket is closed."""
        one, _, reading = ends
        monkeypatch.setattr(reading.lanes[0], "completed", lambda into: None)
        reading.lanes[0].fail()
        self.lose(one, "does not answer")

    def test_a_lost_completion(self, ends: tuple[Node, RdmaConnection, RdmaConnection], monkeypatch: pytest.MonkeyPatch) -> None:
        one, writing, _ = ends
        monkeypatch.setattr("lambdascale.transport.rdma.connection._LOST_S", 1.0)
        monkeypatch.setattr(writing.lanes[0], "completed", lambda into: None)
        self.lose(one, "no completion")

    def test_a_flushed_queue_pair(self, ends: tuple[Node, RdmaConnection, RdmaConnection]) -> None:
        one, writing, _ = ends
        writing.lanes[0].fail()
        one.heard.wait(lambda heard: bool(heard.lost))
        assert "flushed" in one.heard.lost[0][1]
