"""Pacing of links to a given rate by a token bucket, so that a laptop shows the timing relations of a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lambdascale.core.checks import require

# Seconds by which an idle link may run ahead of its rate: longer than a sleep's inaccuracy, much shorter than a block's send.
_BURST_S = 0.002
# Most lateness, in seconds, that a link with work queued makes up for. Its senders are late when they wait for a processor or for
# the interpreter's lock (5 ms each time beside a computing thread), or for the copies beneath the link.
_LATE_S = 0.25
# Longest gap, in seconds, between two pieces of work that counts as work: a receiver asks for its next block when it has noted
# the one before, which takes some messages and threads. Links without pacing have the next write queued by then.
_TURN_S = 0.01
# Most pieces of the slowest of several ways that are granted at once. Each of them is late while another one is waited for; what
# it may make up by one larger piece would be most of a block, and messages would wait for that.
_TOGETHER = 4
# Pieces that work takes at once of a way that it has for itself: fewer sleeps. Other work waits for them at most (50 ms).
_ALONE = 25


class TokenBucket:
    """Limits all senders that share it to ``bytes_per_s`` on average, first come, first served. Thread-safe.

    A link with work queued never idles, whatever its senders' threads wait for: the time that they lose is made up by larger
    pieces, up to a quarter of a second. Gaps of up to ten milliseconds between two pieces of work count as work; of longer ones,
    two milliseconds are made up. Tests replace ``clock`` and ``sleep`` (seconds). UserError unless the rate is positive.
    """

    def __init__(
        self, bytes_per_s: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        require(bytes_per_s > 0, f"a link's rate must be positive, not {bytes_per_s}")
        self.bytes_per_s = bytes_per_s
        self._clock, self._sleep = clock, sleep
        # Guards all below: what is granted is through at _busy_until, what has cut in at _ahead_until; _queued pieces of work
        # are not yet done, none since _idle_at.
        self._lock = threading.Lock()
        self._busy_until = 0.0
        self._ahead_until = 0.0
        self._queued = 0
        self._idle_at = 0.0

    @property
    def piece_bytes(self) -> int:
        """Best number of bytes per ``take``: larger pieces move in bursts, smaller ones add overhead."""
        return max(4096, int(self.bytes_per_s * _BURST_S))

    @property
    def is_shared(self) -> bool:
        """True if several pieces of work wait for the link, or take their time of it."""
        with self._lock:
            return self._queued > 1

    def queued(self) -> None:
        """Note that a piece of work for the link waits from now on, until ``done`` is called."""
        with self._lock:
            now = self._clock()
            if not self._queued and now - self._idle_at > _TURN_S:
                self._busy_until = max(self._busy_until, now - _BURST_S)
            self._queued += 1

    def done(self) -> None:
        """Note the end of a piece of work, whether it was carried out or has failed."""
        with self._lock:
            self._queued -= 1
            self._idle_at = self._clock()
            assert self._queued >= 0, "what is done was queued"

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep a piece of work queued for as long as the context lasts."""
        self.queued()
        try:
            yield
        finally:
            self.done()

    def grant(self, most_bytes: int) -> tuple[int, float]:
        """Return the size of the next piece, of ``most_bytes``, and the seconds until the link has had time for it (0 or more).

        A piece has at least ``piece_bytes``, and all that a late sender has missed. The caller waits.
        """
        with self._lock:
            now = self._clock()
            begin = self._begin(now)
            size = min(most_bytes, max(self.piece_bytes, int((now - begin) * self.bytes_per_s)))
            return size, max(0.0, self._book(begin, size) - now)

    def cut_in(self, size_bytes: int) -> None:
        """Wait until the link has had time for ``size_bytes``, which go ahead of all that has been granted before.

        Behind what other senders have cut in with.
        """
        with self._lock:
            now = self._clock()
            self._book(self._begin(now), size_bytes)
            self._ahead_until = max(self._ahead_until, now) + size_bytes / self.bytes_per_s
            wait_s = self._ahead_until - now
        self.rest(wait_s)

    def reserve(self, size_bytes: int, *, late_s: float = _LATE_S) -> float:
        """Return the seconds until the link has had time for ``size_bytes`` (0 or more). The caller waits.

        ``late_s``: at most so much of the link's idle time is made up while work is queued.
        """
        with self._lock:
            now = self._clock()
            return max(0.0, self._book(self._begin(now, late_s), size_bytes) - now)

    def rest(self, wait_s: float) -> None:
        """Wait so many seconds, by this bucket's clock; not at all if they are none or less."""
        if wait_s > 0:
            self._sleep(wait_s)

    def _begin(self, now: float, late_s: float = _LATE_S) -> float:
        """Return when the next bytes are on the link's schedule. Called with the lock."""
        return max(self._busy_until, now - (late_s if self._queued else _BURST_S))

    def _book(self, begin: float, size_bytes: int) -> float:
        """Put bytes on the schedule; return when they are through. Called with the lock."""
        self._busy_until = begin + size_bytes / self.bytes_per_s
        return self._busy_until


def grant(ways: Sequence[TokenBucket], most_bytes: int) -> tuple[int, float]:
    """Return the size of the next piece, of ``most_bytes``, and the seconds until all ``ways`` have had time for it (0 or more).

    The piece takes all ways at once, so that the slowest of them counts; without any, all goes at once. The caller waits. The
    others idle between pieces: nobody makes that up.
    """
    if not ways:
        return most_bytes, 0.0
    slowest, *others = sorted(ways, key=lambda way: way.bytes_per_s)
    if others:
        most_bytes = min(most_bytes, _TOGETHER * slowest.piece_bytes)
    size, wait_s = slowest.grant(most_bytes)
    return size, max([wait_s, *(way.reserve(size, late_s=_BURST_S) for way in others)])


def take(ways: Sequence[TokenBucket], size_bytes: int) -> None:
    """Wait until all ``ways`` have had time for ``size_bytes``, which take them at once.

    In pieces, so that other work for one of them gets as much of it. See grant.
    """
    if not ways:
        return
    slowest, *others = sorted(ways, key=lambda way: way.bytes_per_s)
    while size_bytes > 0:
        pieces = 1 if any(way.is_shared for way in ways) else _ALONE
        size = min(size_bytes, pieces * slowest.piece_bytes)
        wait_s = max([slowest.reserve(size), *(way.reserve(size, late_s=_BURST_S) for way in others)])
        slowest.rest(wait_s)
        size_bytes -= size
