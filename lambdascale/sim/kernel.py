"""The event kernel of the simulated cluster: a heap of (time, priority, sequence number, action, argument).

Tuples compare without calling Python code, equal times keep the order of priority, then of scheduling, so a run is
deterministic. Entries are never removed: an owner that changed its mind ignores its stale entry when it comes up.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from heapq import heappop, heappush
from typing import Any


class Kernel:
    """Simulated time in seconds, and the actions due at later times."""

    __slots__ = ("_heap", "_sequence", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._sequence = 0

    def at(self, when: float, action: Callable[[Any], None], argument: Any = None, priority: int = 0) -> None:
        """Call ``action(argument)`` at ``when``; never before now."""
        assert when >= self.now, f"scheduling into the past: {when} < {self.now}"
        self._sequence = sequence = self._sequence + 1
        heappush(self._heap, (when, priority, sequence, action, argument))

    def advance(self, before: float, queue: Sized) -> bool:
        """Run actions due earlier than ``before`` until one puts something into ``queue``; False if none did."""
        heap = self._heap
        while heap and heap[0][0] < before:
            self.now, _, _, action, argument = heappop(heap)
            action(argument)
            if queue:
                return True
        return False

    def step(self) -> bool:
        """Advance to the next action and run it; False without one."""
        if not self._heap:
            return False
        self.now, _, _, action, argument = heappop(self._heap)
        action(argument)
        return True
