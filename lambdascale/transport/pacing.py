"""Pacing of links to a given rate by a token bucket, so that a laptop shows the timing relations of a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lambdascale.core.checks import require

# Seconds by which a link may run ahead of its rate: longer than a sleep's inaccuracy, much shorter than a block's send.
_BURST_S = 0.002
# Most oversleeping, in seconds, that a bucket makes up for: on a busy machine, threads are woken later than requested.
_OVERSLEPT_S = 0.05


class TokenBucket:
    """Limits all senders that share it to ``bytes_per_s`` on average, first come, first served. Thread-safe.

    Tests replace ``clock`` and ``sleep`` (seconds). UserError unless the rate is positive.
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
        """Best number of bytes per ``take``: larger pieces move in bursts, smaller ones add overhead."""
        return max(4096, int(self.bytes_per_s * _BURST_S))

    def take(self, size_bytes: int) -> None:
        """Wait until the link has had time for ``size_bytes``."""
        with self._lock:
            now = self._clock()
            begin = max(self._busy_until, now - _BURST_S - self._overslept)
            self._overslept = 0.0
            self._busy_until = due = begin + size_bytes / self.bytes_per_s
        if due > now:
            self._sleep(due - now)
            with self._lock:
                self._overslept = min(_OVERSLEPT_S, max(0.0, self._clock() - due))
