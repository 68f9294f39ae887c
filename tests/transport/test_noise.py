"""Bytes of strangers at each listening port, and frames that no honest node sends: nothing ends, nothing grows."""

from __future__ import annotations

import socket
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lambdascale.live import wire
from lambdascale.live.controller import hub
from lambdascale.live.controller.hub import Hub
from lambdascale.testing.transports import Heard
from lambdascale.transport import TcpEndpoint

KEY = b"k" * 32
SIZE = 1 << 16
FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
HEAD = struct.Struct("!BQQQ")
ODD = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, SIZE - 1, SIZE, SIZE + 1, 1 << 30, 1 << 31, 1 << 62])
FRAME = st.builds(HEAD.pack, st.integers(0, 7) | st.integers(0, 255), ODD, ODD, ODD)


@pytest.fixture(scope="module")
def port() -> Iterator[tuple[TcpEndpoint, Heard]]:
    heard = Heard()
    endpoint = TcpEndpoint(0, heard.handlers(), KEY)
    endpoint.register(endpoint.allocate(SIZE))
    yield endpoint, heard
    endpoint.close()


def connect(endpoint: TcpEndpoint) -> socket.socket:
    host, _, number = endpoint.address.rpartition(":")
    return socket.create_connection((host, int(number)), timeout=10)


def works(endpoint: TcpEndpoint, heard: Heard) -> None:
    """The endpoint takes a node in, and hears it."""
    before = len(heard.messages)
    node = TcpEndpoint(2, Heard().handlers(), KEY)
    node.connect(0, endpoint.address)
    node.send(0, b"there").result(10)
    heard.wait(lambda heard: len(heard.messages) > before)
    node.close()


@FUZZ
@given(st.lists(st.binary(max_size=100), max_size=3), st.booleans())
def test_bytes_at_a_data_port(port: tuple[TcpEndpoint, Heard], said: list[bytes], polite: bool) -> None:
    endpoint, _ = port
    with connect(endpoint) as stranger, suppress(OSError):
        for each in said:
            stranger.sendall((b"lambdascale/3" if polite else b"") + each)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(1000):
            pass
    assert not endpoint._connections


def test_it_works_all_the_same(port: tuple[TcpEndpoint, Heard]) -> None:
    works(*port)


@FUZZ
@given(st.lists(FRAME | st.binary(max_size=40), min_size=1, max_size=6))
def test_frames_of_a_node_with_the_key(port: tuple[TcpEndpoint, Heard], frames: list[bytes]) -> None:
    """The connection may end; what the node announces and does not send takes no memory."""
    endpoint, heard = port
    heard.lost.clear()
    node = TcpEndpoint(1, Heard().handlers(), KEY)
    node.connect(0, endpoint.address)
    sock = node._connections[0].sock
    tracemalloc.start()
    try:
        with suppress(OSError):
            sock.sendall(b"".join(frames))
            sock.shutdown(socket.SHUT_RDWR)
        # Of a connection that ended with a goodbye nothing is heard.
        for _ in range(1000):
            if heard.lost or 1 not in endpoint._connections:
                break
            time.sleep(0.01)
        else:
            pytest.fail("the connection goes on")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
        node.close()
    endpoint.sever(1)


def test_it_still_works(port: tuple[TcpEndpoint, Heard]) -> None:
    works(*port)


class Controller:
    """A hub, and node 3 with the key."""

    def __init__(self) -> None:
        self.hub, self.context = Hub("127.0.0.1"), zmq.Context[zmq.Socket[bytes]]()
        access = self.hub.access
        self.node = self.context.socket(zmq.DEALER)
        self.node.identity, self.node.linger = b"3.0", 0
        self.node.curve_serverkey = access.server_public
        self.node.curve_publickey, self.node.curve_secretkey = access.client_public, access.client_secret
        self.node.connect(access.controller)

    def hears_a_beat(self) -> None:
        """Everything said before has been taken by then."""
        self.node.send(wire.encode(wire.Beat()))
        for _ in range(100):
            if (3, wire.Beat()) in self.hub.poll(1)[0]:
                return
        pytest.fail("it is not heard")

    def close(self) -> None:
        self.node.close()
        self.hub.close()
        self.context.term()


@pytest.fixture(scope="module")
def controller() -> Iterator[Controller]:
    controller = Controller()
    yield controller
    controller.close()


@FUZZ
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4))
def test_parts_of_a_node_with_the_key(controller: Controller, parts: list[bytes]) -> None:
    """Garbage, and messages of several parts."""
    controller.node.send_multipart(parts)
    controller.hears_a_beat()


@FUZZ
@given(st.binary(max_size=200), st.sampled_from(["controller", "pulse"]), st.booleans())
def test_bytes_at_the_controllers_ports(controller: Controller, said: bytes, which: str, polite: bool) -> None:
    """No greeting, half of one, or one that goes on wrongly."""
    host, _, number = getattr(controller.hub.access, which).removeprefix("tcp://").rpartition(":")
    greeting = b"\xff\0\0\0\0\0\0\0\1\x7f\3\0CURVE".ljust(64, b"\0")
    with socket.create_connection((host, int(number)), timeout=10) as stranger, suppress(OSError):
        stranger.sendall((greeting if polite else b"") + said)
    controller.hears_a_beat()


def test_a_node_that_never_stops_talking_holds_nobody_up(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control thread gets back to its other work after so many messages, and hears the rest next."""
    monkeypatch.setattr(hub, "_AT_A_TIME", 10)
    for _ in range(50):
        controller.node.send(wire.encode(wire.Placed(3, "m")))
    heard = []
    while len(heard) < 50:
        now, _ = controller.hub.poll(1)
        assert 0 < len(now) <= 10
        heard += now
    controller.hears_a_beat()


def test_a_message_that_is_too_large_is_not_taken(controller: Controller) -> None:
    """The sender is cut off; it may connect again."""
    controller.node.send(bytes(wire.MOST_BYTES + 1))
    controller.hears_a_beat()
