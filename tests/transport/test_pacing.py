"""Paced ways: the rate of one, of several at once, and what shares them."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from lambdascale.transport import TokenBucket
from lambdascale.transport.pacing import grant, take


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
            take([bucket], 50)
        assert now[0] - 100.0 == pytest.approx(5.0, abs=0.01)

    def test_oversleeping_is_made_up(self) -> None:
        bucket, now = self.bucket(1000.0, oversleeps=0.03)
        with bucket.busy():
            for _ in range(100):
                take([bucket], 50)
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
            take([bucket], 10_000)
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
        take([bucket], 10)
        now[0] += 50.0
        begin = now[0]
        take([bucket], 1000)
        assert now[0] - begin == pytest.approx(1.0, abs=0.01)

    def test_sharers_share(self) -> None:
        bucket = TokenBucket(50e6)
        begin = time.monotonic()
        threads = [threading.Thread(target=lambda: [take([bucket], bucket.piece_bytes) for _ in range(25)]) for _ in range(4)]
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

    def test_the_faster_way_saves_no_time_up(self) -> None:
        """PCIe waits for the link between pieces: a load that begins meanwhile takes its own time of it."""
        (link, pcie), now = self.ways(1e6, 10e6)
        with link.busy(), pcie.busy():
            for _ in range(100):
                now[0] += grant([link, pcie], 5_000)[1]
            assert pcie.reserve(1_000_000) == pytest.approx(0.1, abs=0.01)

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
