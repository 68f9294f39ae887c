"""NCCL's broadcast as a plan: one root and a ring cut open, in which nodes forward small pieces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lambdascale.core import MulticastPlan, Send
from lambdascale.multicast import check_counts


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A ``streaming`` chain from the first source through all destinations: b + n - 2 rounds for b blocks and n members.

    A broadcast has one root, so further sources take no part in the plan and are not among its members.
    """

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """See MulticastPlanner; members are the first source and the destinations. PlanError for invalid counts."""
        check_counts(sources, destinations, blocks)
        return _chain(sources, destinations, blocks)


@lru_cache(maxsize=256)
def _chain(sources: int, destinations: int, blocks: int) -> MulticastPlan:
    nodes = (0, *range(sources, sources + destinations))
    hops = range(destinations)
    rounds = [
        tuple(Send(nodes[hop], nodes[hop + 1], number - hop) for hop in hops if 0 <= number - hop < blocks)
        for number in range(blocks + destinations - 1 if destinations else 0)
    ]
    return MulticastPlan(
        members=nodes,
        sources=(0,),
        blocks=blocks,
        rounds=tuple(rounds),
        groups=(nodes,),
        orders=(tuple(range(blocks)),),
        streaming=True,
    )
