"""Restarts of lost nodes' processes: after a delay that doubles, and a bounded number of times."""

from __future__ import annotations

import time
from collections.abc import Callable

from lambdascale.core import NodeId

FIRST_S = 0.5
LONGEST_S = 30.0
WINDOW_S = 600.0


class Supervisor:
    """Restarts each node ``limit`` times within ten minutes at most; 0 never restarts. It decides; the roster carries out.

    The first restart comes half a second after the loss, each further one in the window after twice the time, 30 s at most.
    Restarts since the node was last up count however long ago they were, so that starts that hang come to an end.
    """

    def __init__(self, limit: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._say = say
        self._clock = clock
        self._restarts: dict[NodeId, list[float]] = {}
        self._futile: dict[NodeId, int] = {}  # restarts since the node was last up
        self._due: dict[NodeId, float] = {}

    @property
    def waiting(self) -> bool:
        """True if a restart is to come."""
        return bool(self._due)

    def joined(self, node: NodeId) -> None:
        """Take note that a node is up."""
        self._futile.pop(node, None)

    def lost(self, node: NodeId) -> bool:
        """Plan the restart of a node whose process has ended; False if it is given up instead."""
        now = self._clock()
        recent = [at for at in self._restarts.get(node, ()) if now - at < WINDOW_S]
        self._restarts[node] = recent
        tries = max(len(recent), self._futile.get(node, 0))
        if tries < self._limit:
            self._due[node] = now + min(LONGEST_S, FIRST_S * 2**tries)
            return True
        if self._limit:
            within = f"within {WINDOW_S:.0f} s" if len(recent) >= self._limit else "and did not come up"
            self._say(f"node {node} was restarted {tries} times {within}: given up")
        return False

    def take_due(self) -> list[NodeId]:
        """Return the nodes to restart now."""
        now = self._clock()
        due = sorted(node for node, at in self._due.items() if at <= now)
        for node in due:
            del self._due[node]
            self._restarts[node].append(now)
            self._futile[node] = self._futile.get(node, 0) + 1
        return due

    def wait_s(self) -> float:
        """Seconds until the next restart, infinite if none is planned."""
        return max(0.0, min(self._due.values()) - self._clock()) if self._due else float("inf")
