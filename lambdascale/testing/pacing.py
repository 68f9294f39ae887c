"""A bucket that counts, for tests of what takes it."""

from __future__ import annotations

import threading

from lambdascale.transport import TokenBucket


class Counting(TokenBucket):
    """A bucket that counts the ``bytes`` it has had time for, and the work that waited for it ``most_at_once``."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(bytes_per_s)
        self.bytes = self.most_at_once = self._waiting = 0
        # Guards the counts.
        self._counted = threading.Condition()

    def grant(self, most_bytes: int) -> tuple[int, float]:
        """See TokenBucket."""
        size, wait_s = super().grant(most_bytes)
        self._count(size)
        return size, wait_s

    def reserve(self, size_bytes: int, **late: float) -> float:
        """See TokenBucket."""
        self._count(size_bytes)
        return super().reserve(size_bytes, **late)

    def _count(self, size_bytes: int) -> None:
        with self._counted:
            self.bytes += size_bytes

    def queued(self) -> None:
        """See TokenBucket."""
        super().queued()
        self._wait(1)

    def done(self) -> None:
        """See TokenBucket."""
        super().done()
        self._wait(-1)

    def _wait(self, change: int) -> None:
        with self._counted:
            self._waiting += change
            self.most_at_once = max(self.most_at_once, self._waiting)
            self._counted.notify_all()

    def settled(self, seconds: float) -> None:
        """Wait until no work waits for it any more; AssertionError after ``seconds``."""
        with self._counted:
            assert self._counted.wait_for(lambda: not self._waiting, seconds), f"{self._waiting} pieces of work are not done"
