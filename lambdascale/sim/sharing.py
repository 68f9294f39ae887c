"""Slowdowns of a simulated node's iterations: cores that it shares with others, as the processes of a live cluster on one host
do, and multicasts that read and write its GPUs' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Pace(Protocol):
    """Slowdown of iterations; those that compute hear of changes, and may begin the next iteration at the new pace."""

    def enter(self, changed: Callable[[], None]) -> tuple[int, float]:
        """Begin to compute; return a ticket to leave with and the factor by which computing takes longer than alone."""
        ...

    def leave(self, ticket: int) -> None:
        """Stop computing; unknown tickets are ignored."""
        ...


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


class DisturbedPace:
    """Pace of a node's iterations beside multicasts: the largest slowdown of those under way, and that of shared ``cores``."""

    def __init__(self, cores: SharedCores | None) -> None:
        self._cores = cores
        self._slowdowns: list[float] = []
        self._computing: dict[int, Callable[[], None]] = {}
        self._next = 0

    def disturb(self, slowdown: float, begins: bool) -> None:
        """Take note that a multicast that slows the node begins or ends."""
        for changed in list(self._computing.values()):
            changed()
        if begins:
            self._slowdowns.append(slowdown)
        else:
            self._slowdowns.remove(slowdown)

    def enter(self, changed: Callable[[], None]) -> tuple[int, float]:
        """See Pace."""
        if self._cores is None:
            self._next += 1
            ticket, pace = self._next, 1.0
        else:
            ticket, pace = self._cores.enter(changed)
        self._computing[ticket] = changed
        return ticket, pace * max(self._slowdowns, default=1.0)

    def leave(self, ticket: int) -> None:
        """See Pace."""
        self._computing.pop(ticket, None)
        if self._cores is not None:
            self._cores.leave(ticket)
