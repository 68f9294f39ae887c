"""The TCP and shared-memory transports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from lambdascale.testing.transports import Heard, TransportConformance
from lambdascale.transport import Endpoint, Handlers, ShmEndpoint, TcpEndpoint, TokenBucket, TransportError

KEY = b"k" * 32


class TestTcp(TransportConformance):
    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return TcpEndpoint(node, handlers, KEY)

    def break_off(self, endpoint: Endpoint) -> None:
        assert isinstance(endpoint, TcpEndpoint)
        for connection in list(endpoint._connections.values()):
            connection.sock.shutdown(socket.SHUT_RDWR)


class TestPacedTcp(TestTcp):
    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return TcpEndpoint(node, handlers, KEY, link=TokenBucket(200e6))


class TestShm(TestTcp):
    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return ShmEndpoint(node, handlers, KEY)

    def test_memory_of_somebody_else_cannot_be_registered(self) -> None:
        endpoint = ShmEndpoint(0, Heard().handlers(), KEY)
        with pytest.raises(ValueError, match="allocate"):
            endpoint.register(memoryview(bytearray(10)))
        endpoint.close()

    def test_nothing_is_left_in_dev_shm(self) -> None:
        before = set(os.listdir("/dev/shm"))
        endpoint = ShmEndpoint(0, Heard().handlers(), KEY)
        endpoint.register(endpoint.allocate(1 << 20))
        assert set(os.listdir("/dev/shm")) == before
        endpoint.close()


class TestPacedShm(TestTcp):
    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return ShmEndpoint(node, handlers, KEY, link=TokenBucket(200e6))


@pytest.mark.parametrize("kind", [TcpEndpoint, ShmEndpoint])
def test_a_message_does_not_wait_for_a_long_write(kind: type[TcpEndpoint]) -> None:
    """Messages (such as hidden states) arrive while blocks are being written over the same connection."""
    heard = Heard()
    one, two = kind(1, heard.handlers(), KEY, link=TokenBucket(20e6)), kind(0, heard.handlers(), KEY)
    two.register(two.allocate(10_000_000))
    one.connect(0, two.address)
    write = one.write(0, memoryview(bytes(10_000_000)), 0, 1)
    one.place(0, memoryview(b"quicker"), 0).result(10)
    one.send(0, b"quick").result(10)
    assert not write.done()
    write.result(10)
    heard.wait(lambda heard: bool(heard.writes and heard.messages))
    one.close()
    two.close()


@pytest.mark.parametrize("kind", [TcpEndpoint, ShmEndpoint])
def test_a_link_is_busy_from_a_write_to_its_end(kind: type[TcpEndpoint]) -> None:
    """A paced link knows of writes and messages that wait, and of none afterwards, also if they fail."""

    class Watched(TokenBucket):
        at_once = waiting = 0

        def queued(self) -> None:
            super().queued()
            self.waiting += 1
            self.at_once = max(self.at_once, self.waiting)

        def done(self) -> None:
            self.waiting -= 1
            super().done()

    heard, link = Heard(), Watched(20e6)
    one, two = kind(1, heard.handlers(), KEY, link=link), kind(0, heard.handlers(), KEY)
    two.register(two.allocate(1_000_000))
    one.connect(0, two.address)
    futures = [one.write(0, memoryview(bytes(500_000)), at, 1) for at in (0, 500_000, 999_999)]
    one.send(0, b"quick").result(10)
    with pytest.raises(TransportError):  # it goes beyond the peer's memory
        futures[-1].result(10)
    heard.wait(lambda heard: len(heard.lost) == 2)
    with pytest.raises(TransportError):
        one.send(0, b"nobody").result(10)
    one.close()
    two.close()
    assert (link.waiting, link.at_once) == (0, 4)


@pytest.mark.parametrize("kind", [TcpEndpoint, ShmEndpoint])
def test_a_handler_that_fails(kind: type[TcpEndpoint], capsys: pytest.CaptureFixture[str]) -> None:
    """A write that no handler took note of does not count: the connection ends, at both ends, and the fault is printed."""

    def fail(peer: int, data: bytes) -> None:
        raise ZeroDivisionError("mine")

    heard, lost, ended = Heard(), list[str](), threading.Event()

    def on_lost(peer: int, reason: str) -> None:
        lost.append(reason)
        ended.set()

    one = kind(1, heard.handlers(), KEY)
    two = kind(0, Handlers(on_write=lambda *_: None, on_message=fail, on_lost=on_lost), KEY)
    one.connect(0, two.address)
    one.send(0, b"x").result(10)
    assert ended.wait(10)
    heard.wait(lambda heard: bool(heard.lost))
    assert lost == ["mine"]
    assert "ZeroDivisionError: mine" in capsys.readouterr().err
    one.close()
    two.close()


@pytest.mark.parametrize("kind", [TcpEndpoint, ShmEndpoint])
def test_nothing_is_hashed_for_those_that_do_not_verify(kind: type[TcpEndpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes come without hashes where no handler takes them, and no end computes any."""
    monkeypatch.setattr("xxhash.xxh3_64", lambda: pytest.fail("it is hashed"))
    written, ended = list[tuple[int, int, int, int]](), threading.Event()

    def on_write(*write: int) -> None:
        written.append(write)
        ended.set()

    ends = [kind(node, Handlers(on_write=on_write, on_message=print, on_lost=print), KEY) for node in range(2)]
    memory = ends[0].allocate(100_000)
    ends[0].register(memory)
    ends[1].connect(0, ends[0].address)
    ends[1].write(0, memoryview(b"x" * 50_000), 7, 5).result(10)
    assert ended.wait(10)
    assert written == [(1, 5, 7, 50_000)]
    assert bytes(memory[7:50_007]) == b"x" * 50_000
    for end in ends:
        end.close()


class TestStrangers:
    def test_another_key(self) -> None:
        heard = Heard()
        one, two = TcpEndpoint(1, heard.handlers(), KEY), TcpEndpoint(0, heard.handlers(), b"other")
        with pytest.raises(TransportError, match="does not answer as one of this cluster"):
            one.connect(0, two.address)
        assert not one._connections
        one.close()
        two.close()
        assert not two._connections
        assert not heard.lost

    @pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(500)])
    def test_noise(self, noise: bytes) -> None:
        heard = Heard()
        endpoint = TcpEndpoint(0, heard.handlers(), KEY)
        host, _, port = endpoint.address.rpartition(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(noise)
            stranger.settimeout(10)
            with suppress(OSError):  # the endpoint may have closed the connection already
                stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while stranger.recv(1000):
                    pass
        assert not endpoint._connections
        endpoint.close()


@pytest.mark.live
def test_a_killed_process_is_noticed() -> None:
    """The peer hears of the loss in the middle of a write."""
    code = (
        "import sys, time\n"
        "from lambdascale.testing.transports import Heard\n"
        "from lambdascale.transport import TcpEndpoint\n"
        "endpoint = TcpEndpoint(0, Heard().handlers(), b'k' * 32)\n"
        "endpoint.register(memoryview(bytearray(1 << 28)))\n"
        "print(endpoint.address, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        heard = Heard()
        endpoint = TcpEndpoint(1, heard.handlers(), KEY, link=TokenBucket(100e6))
        endpoint.connect(0, address)
        future = endpoint.write(0, memoryview(bytes(1 << 28)), 0, 1)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        heard.wait(lambda heard: bool(heard.lost))
        with pytest.raises(TransportError):
            future.result(5)
        endpoint.close()
