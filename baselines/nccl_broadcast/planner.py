"""NCCL's broadcast as a plan: for each root a ring cut open, in which nodes forward small pieces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from lambdascale.core import MulticastPlan, Send
from lambdascale.multicast import check_counts, near_equal_groups


@dataclass(frozen=True, kw_only=True)
class Chain:
    """``streaming`` chains, one from each source through its share of the destinations: b + n - 2 rounds for b blocks, n members.

    A broadcast has one root: each chain is a broadcast by itself, over a communicator of its own.
    """

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """See MulticastPlanner. PlanError for invalid counts."""
        check_counts(sources, destinations, blocks)
        return _chains(sources, destinations, blocks)


@lru_cache(maxsize=256)
def _chains(sources: int, destinations: int, blocks: int) -> MulticastPlan:
    groups = near_equal_groups(sources, destinations)
    longest = max(len(group) for group in groups) - 1
    rounds = [
        tuple(
            Send(src, dst, number - hop)
            for group in groups
            for hop, (src, dst) in enumerate(pairwise(group))
            if 0 <= number - hop < blocks
        )
        for number in range(blocks + longest - 1 if longest else 0)
    ]
    return MulticastPlan(
        members=tuple(range(sources + destinations)),
        sources=tuple(range(sources)),
        blocks=blocks,
        rounds=tuple(rounds),
        groups=groups,
        orders=(tuple(range(blocks)),) * len(groups),
        streaming=True,
    )
