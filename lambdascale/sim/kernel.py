"""The event kernel of the simulated cluster: a heap of (time, priority, sequence number, action, argument).

Tuples compare without calling Python code, equal times keep the order of priority, then of scheduling, so a run is
deterministic. There is no removal: an owner that changed its mind ignores its stale entry when it comes up.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Kernel:
    """Simulated time (seconds) and what is due when."""

    __slots__ = ("_heap", "_sequence", "now", "steps")

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._heap: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._sequence = 0

    def at(self, when: float, action: Callable[[Any], None], argument: Any = None, priority: int = 0) -> None:
        """Call ``action(argument)`` at ``when``; never before now."""
        assert when >= self.now, f"scheduling into the past: {when} < {self.now}"
        self._sequence += 1
        heappush(self._heap, (when, priority, self._sequence, action, argument))

    def next_time(self) -> float | None:
        """When the next action is due; None if nothing is."""
        return self._heap[0][0] if self._heap else None

    def step(self) -> bool:
        """Advance to the next action and run it; False if there was none."""
        if not self._heap:
            return False
        self.now, _, _, action, argument = heappop(self._heap)
        self.steps += 1
        action(argument)
        return True
