"""The TCP and shared-memory transports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from lambdascale.testing.transports import Heard, TransportConformance
from lambdascale.transport import Endpoint, Handlers, ShmEndpoint, TcpEndpoint, TokenBucket, TransportError
from lambdascale.transport.pacing import grant, take

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


class TestPacing:
    @staticmethod
    def bucket(rate: float, oversleeps: float = 0.0) -> tuple[TokenBucket, list[float]]:
        now = [100.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds + oversleeps

        return TokenBucket(rate, clock=lambda: now[0], sleep=sleep), now

    def test_the_rate_is_kept(self) -> None:
        bucket, now = self.bucket(1000.0)
        for _ in range(100):
            bucket.take(50)
        assert now[0] - 100.0 == pytest.approx(5.0, abs=0.01)

    def test_oversleeping_is_made_up(self) -> None:
        bucket, now = self.bucket(1000.0, oversleeps=0.03)
        with bucket.busy():
            for _ in range(100):
                bucket.take(50)
        assert now[0] - 100.0 == pytest.approx(5.0, abs=0.05)

    @pytest.mark.parametrize("late_s", [0.0005, 0.005, 0.05])
    def test_a_sender_that_is_late_with_every_piece_keeps_the_rate(self, late_s: float) -> None:
        """A thread that waits for the interpreter's lock after each piece: 840 MB at 12.5 GB/s take 67 ms all the same."""
        bucket, now = self.bucket(12.5e9)
        left, pieces, begin = 840_000_000, 0, now[0]
        with bucket.busy():
            while left:
                size, wait_s = bucket.grant(left)
                assert 0 <= wait_s <= 0.0021
                now[0] += wait_s + late_s
                left, pieces = left - size, pieces + 1
        assert 840e6 / 12.5e9 - 0.003 <= now[0] - begin <= 840e6 / 12.5e9 + 0.001 + 2 * late_s
        assert pieces <= 840e6 / 12.5e9 / late_s + 2

    def test_lateness_beyond_a_quarter_of_a_second_is_lost(self) -> None:
        bucket, now = self.bucket(1e7)
        with bucket.busy():
            now[0] += 100.0
            assert bucket.grant(10_000_000) == (2_500_000, 0.0)
            assert bucket.grant(10_000_000) == (20_000, pytest.approx(0.002))

    def test_time_without_work_is_not_made_up(self) -> None:
        """Work that comes after a pause has the burst only, also after earlier work."""
        bucket, now = self.bucket(1e7)
        with bucket.busy():
            bucket.take(10_000)
        now[0] += 0.1
        with bucket.busy():
            assert bucket.grant(1_000_000) == (20_000, pytest.approx(0.0, abs=1e-9))
            assert bucket.grant(1_000_000) == (20_000, pytest.approx(0.002))

    def test_blocks_follow_each_other(self) -> None:
        """Late with every piece, and 5 ms between two blocks: 16 blocks take as long as planned."""
        bucket, now = self.bucket(12.5e9)
        begin = now[0]
        for _ in range(16):
            with bucket.busy():
                left = 840_000_000
                while left:
                    size, wait_s = bucket.grant(left)
                    now[0] += wait_s + 0.005
                    left -= size
            now[0] += 0.005
        assert now[0] - begin == pytest.approx(16 * 840e6 / 12.5e9, rel=0.02)

    def test_two_senders_are_busy_until_the_last_is_done(self) -> None:
        bucket, now = self.bucket(1e7)
        bucket.queued()
        bucket.queued()
        bucket.done()
        now[0] += 0.05
        size, _ = bucket.grant(1_000_000)
        assert size == pytest.approx(520_000, abs=10)
        bucket.done()

    def test_a_message_goes_ahead_and_is_counted(self) -> None:
        bucket, now = self.bucket(1e7)
        with bucket.busy():
            bucket.grant(20_000)
            _, wait_s = bucket.grant(20_000)
            bucket.cut_in(10_000)
            assert now[0] - 100.0 == pytest.approx(0.001)
            assert bucket.grant(20_000)[1] == pytest.approx(wait_s + 0.002)

    def test_what_goes_ahead_to_several_peers_shares_the_link(self) -> None:
        """Large things do, such as KV for two nodes: each peer has a sender of its own."""
        bucket, now = self.bucket(1e7)
        waits: list[float] = []
        bucket._sleep = waits.append
        for _ in range(3):
            bucket.cut_in(10_000)
        assert waits == pytest.approx([0.001, 0.002, 0.003])
        now[0] += 0.003
        bucket.cut_in(10_000)
        assert waits[-1] == pytest.approx(0.001)

    def test_idle_time_is_not_saved_up(self) -> None:
        bucket, now = self.bucket(1000.0)
        bucket.take(10)
        now[0] += 50.0
        begin = now[0]
        bucket.take(1000)
        assert now[0] - begin == pytest.approx(1.0, abs=0.01)

    def test_sharers_share(self) -> None:
        bucket = TokenBucket(50e6)
        begin = time.monotonic()
        threads = [threading.Thread(target=lambda: [bucket.take(bucket.piece_bytes) for _ in range(25)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - begin >= 0.9 * 100 * bucket.piece_bytes / 50e6

    def test_a_rate_of_nothing(self) -> None:
        with pytest.raises(ValueError, match="must be positive"):
            TokenBucket(0)


class TestSeveralWays:
    """Pieces that take several paced ways at once."""

    @staticmethod
    def ways(*rates: float) -> tuple[list[TokenBucket], list[float]]:
        now = [100.0]
        return [TokenBucket(rate, clock=lambda: now[0]) for rate in rates], now

    def move(self, ways: list[TokenBucket], now: list[float], size: int, late_s: float = 0.0) -> list[int]:
        """Move ``size`` bytes as a connection does, each piece ``late_s`` later than it could; return the pieces."""
        pieces = []
        with ExitStack() as ended:
            for way in ways:
                ended.enter_context(way.busy())
            while size:
                piece, wait_s = grant(ways, size)
                now[0] += wait_s + late_s
                pieces.append(piece)
                size -= piece
        return pieces

    @pytest.mark.parametrize("rates", [(50e9, 26e9), (26e9, 50e9), (1e12, 26e9), (26e9, 26e9), (26e9,)])
    @pytest.mark.parametrize("late_s", [0.0, 0.001])
    def test_the_slowest_counts(self, rates: tuple[float, ...], late_s: float) -> None:
        """26 GB at the rate of the slowest take a second, also by a thread that is late with every piece."""
        ways, now = self.ways(*rates)
        self.move(ways, now, 26_000_000_000, late_s)
        assert now[0] - 100.0 == pytest.approx(1.0, abs=0.02)

    def test_pieces_stay_small(self) -> None:
        """The faster way is late with every piece, which it does not make up by one large piece: messages would wait for it."""
        ways, now = self.ways(1e12, 26e9)
        assert max(self.move(ways, now, 2_600_000_000)) <= 4 * ways[1].piece_bytes

    def test_a_way_that_others_use(self) -> None:
        """A link half of whose time goes to somebody else leaves its half, whatever PCIe could carry."""
        (link, pcie), now = self.ways(50e9, 40e9)
        size = 25_000_000_000
        with link.busy(), pcie.busy():
            while size:
                link.reserve(min(size, 50_000_000))
                piece, wait_s = grant([link, pcie], min(size, 50_000_000))
                now[0] += wait_s
                size -= piece
        assert now[0] - 100.0 == pytest.approx(1.0, abs=0.02)

    def test_no_way(self) -> None:
        assert grant([], 5) == (5, 0.0)

    def test_work_that_shares_a_way_gets_half_of_it(self) -> None:
        """A load of large blocks beside a send of small pieces, over the same PCIe: neither waits for the other's end."""
        pcie, ends = TokenBucket(10e6), {}

        def move(name: str, pieces: list[int]) -> None:
            with pcie.busy():
                for piece in pieces:
                    take([pcie], piece)
            ends[name] = time.monotonic() - begin

        begin = time.monotonic()
        threads = [threading.Thread(target=move, args=each) for each in (("load", [1_000_000] * 2), ("send", [20_000] * 50))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ends["send"] < ends["load"], "a million bytes before two million"
        assert ends["load"] >= 0.29

    def test_waiting_for_all(self) -> None:
        ways = [TokenBucket(1e9), TokenBucket(1e6)]
        begin = time.monotonic()
        take(ways, 50_000)
        assert time.monotonic() - begin >= 0.045
        take([], 50_000)
