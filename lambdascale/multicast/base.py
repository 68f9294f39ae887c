"""What a multicast planner is."""

from __future__ import annotations

from typing import Protocol

from lambdascale.core import MulticastPlan


class MulticastPlanner(Protocol):
    """Decides who sends which block to whom in which round. Pure: no clock, no randomness, no I/O."""

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """A valid plan over positions 0..sources+destinations-1, sources first; PlanError if the numbers make no sense."""
        ...
