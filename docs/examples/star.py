"""The tutorial's multicast planner: every source sends to its own share of the destinations, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from lambdascale.core import MulticastPlan, Send
from lambdascale.multicast import check_counts, injection_orders, near_equal_groups


@dataclass(frozen=True, kw_only=True)
class Star:
    """One star per source: no destination passes a block on. ``shift``: sources begin with different blocks."""

    shift: bool = True

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """See MulticastPlanner; PlanError without sources or blocks."""
        check_counts(sources, destinations, blocks)
        groups = near_equal_groups(sources, destinations)
        orders = injection_orders(blocks, len(groups), "shift" if self.shift else "none")
        queues = [
            [Send(group[0], node, block) for block in order for node in group[1:]]
            for group, order in zip(groups, orders, strict=True)
        ]
        longest = max(len(queue) for queue in queues)
        return MulticastPlan(
            members=tuple(range(sources + destinations)),
            sources=tuple(range(sources)),
            blocks=blocks,
            rounds=tuple(tuple(queue[number] for queue in queues if number < len(queue)) for number in range(longest)),
            groups=groups,
            orders=orders,
        )
