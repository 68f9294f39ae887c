"""Protocol of multicast planners."""

from __future__ import annotations

from typing import Protocol

from lambdascale.core import MulticastPlan


class MulticastPlanner(Protocol):
    """Part of a system that decides which node sends which block to which in each round. Pure: no clock, randomness or I/O."""

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """Return a valid plan over positions 0..sources+destinations-1, sources first; PlanError for impossible numbers."""
        ...
