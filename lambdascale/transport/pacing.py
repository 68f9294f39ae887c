"""A link as slow as one says: a token bucket that makes a laptop show the timing relations of a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lambdascale.core.checks import require

# How far a link may run ahead of its rate: long enough for a sleep's inaccuracy, short beside any block's time.
_BURST_S = 0.002
# How much of its own oversleeping a bucket makes up: on a busy machine, threads are woken later than they asked for.
_OVERSLEPT_S = 0.05


class TokenBucket:
    """At most ``bytes_per_s`` on average for all who share the bucket, first come, first served. Thread-safe.

    ``clock`` and ``sleep`` (seconds) are there for tests.
    """

    def __init__(
        self, bytes_per_s: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        require(bytes_per_s > 0, f"a link's rate must be positive, not {bytes_per_s}")
        self.bytes_per_s = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._busy_until = 0.0
        self._overslept = 0.0

    @property
    def piece_bytes(self) -> int:
        """The size to pace at: larger pieces would move in bursts, smaller ones only cost."""
        return max(4096, int(self.bytes_per_s * _BURST_S))

    def take(self, size_bytes: int) -> None:
        """Wait until ``size_bytes`` have passed the link."""
        with self._lock:
            now = self._clock()
            begin = max(self._busy_until, now - _BURST_S - self._overslept)
            self._overslept = 0.0
            self._busy_until = due = begin + size_bytes / self.bytes_per_s
        if due > now:
            self._sleep(due - now)
            with self._lock:
                self._overslept = min(_OVERSLEPT_S, max(0.0, self._clock() - due))
