"""The cores of a machine that simulated nodes share, as the processes of a live cluster on one host do."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class SharedCores:
    """Who computes now, and how much slower for that. ``slowdown``: see ComputeSpec.shared_slowdown.

    Whoever computes over many iterations is told when the number changes, and may begin the next iteration at the new pace.
    """

    def __init__(self, slowdown: Sequence[float]) -> None:
        self._slowdown = tuple(slowdown)
        self._computing: dict[int, Callable[[], None]] = {}
        self._next = 0

    def enter(self, changed: Callable[[], None]) -> tuple[int, float]:
        """Somebody begins to compute: a ticket to leave with, and how many times longer it takes than alone."""
        if not self._slowdown:
            return -1, 1.0
        self._tell()
        self._next += 1
        self._computing[self._next] = changed
        return self._next, self._pace(len(self._computing))

    def leave(self, ticket: int) -> None:
        """It computes no more."""
        if self._computing.pop(ticket, None) is not None:
            self._tell()

    def _tell(self) -> None:
        for changed in list(self._computing.values()):
            changed()

    def _pace(self, computing: int) -> float:
        known = len(self._slowdown)
        return self._slowdown[min(computing, known) - 1] * max(1.0, computing / known)
