"""The cores of a machine that simulated nodes share, as the processes of a live cluster on one host do."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class SharedCores:
    """Number of nodes that compute concurrently, and the slowdown that causes. ``slowdown``: see ComputeSpec.shared_slowdown.

    A node that computes over many iterations hears when the number changes, and may begin the next iteration at the new pace.
    """

    def __init__(self, slowdown: Sequence[float]) -> None:
        self._slowdown = tuple(slowdown)
        self._computing: dict[int, Callable[[], None]] = {}
        self._next = 0

    def enter(self, changed: Callable[[], None]) -> tuple[int, float]:
        """Begin to compute; return a ticket to leave with and the factor by which computing takes longer than alone."""
        self._tell()
        self._next += 1
        self._computing[self._next] = changed
        return self._next, self._pace(len(self._computing))

    def leave(self, ticket: int) -> None:
        """Stop computing; unknown tickets are ignored."""
        if self._computing.pop(ticket, None) is not None:
            self._tell()

    def _tell(self) -> None:
        for changed in list(self._computing.values()):
            changed()

    def _pace(self, computing: int) -> float:
        known = len(self._slowdown)
        return self._slowdown[min(computing, known) - 1] * max(1.0, computing / known)
