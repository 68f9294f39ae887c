"""No multicast: every node loads for itself."""

from __future__ import annotations

from dataclasses import dataclass

from lambdascale.core import MulticastPlan
from lambdascale.multicast.binomial import check_counts


@dataclass(frozen=True, kw_only=True)
class EachForItself:
    """Planner of systems without a multicast: no node sends anything."""

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """Return a plan without rounds: valid, but not complete."""
        check_counts(sources, destinations, blocks)
        return MulticastPlan(
            members=tuple(range(sources + destinations)), sources=tuple(range(sources)), blocks=blocks, rounds=()
        )
