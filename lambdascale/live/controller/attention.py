"""Time in which the controller attended to its nodes."""

from __future__ import annotations

import time
from collections.abc import Callable

LOOK_S = 1.0  # the control thread looks at its nodes at least so often


class AttendedTime:
    """A clock of seconds that stands still while the controller, or the whole machine, is stopped.

    What a node or a connection owes within some seconds is counted in them: after a pause, what has come in is read first. Two
    looks that are more than two seconds apart are a pause. Belongs to the control thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = self._attended = clock()

    def __call__(self) -> float:
        """Return the time, which never goes back."""
        now = self._clock()
        since, self._looked = now - self._looked, now
        self._attended += since if since <= 2 * LOOK_S else 0.0
        return self._attended
