"""What makes a plan valid, and what can be read off one: who holds what after which round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from lambdascale.core import MulticastPlan, NodeId, PlanError, Send

Holdings = Mapping[NodeId, Collection[int]]


def arrival_rounds(plan: MulticastPlan) -> dict[NodeId, dict[int, int]]:
    """For every receiving node: block -> the round (from 1) in which it arrives. No check of validity."""
    arrivals: dict[NodeId, dict[int, int]] = {node: {} for node in plan.destinations}
    for number, transfers in enumerate(plan.rounds, start=1):
        for t in transfers:
            arrivals.setdefault(t.dst, {})[t.block] = number
    return arrivals


def completion_rounds(plan: MulticastPlan) -> dict[NodeId, int]:
    """For every destination: the round after which it holds the whole model."""
    arrivals = arrival_rounds(plan)
    return {node: max(arrivals[node].values(), default=0) for node in plan.destinations}


def validate_plan(plan: MulticastPlan, *, complete: bool = True, holdings: Holdings | None = None) -> None:
    """Raise PlanError, naming round, node and block, unless the plan is valid.

    Every destination gets every block exactly once (``complete=False`` allows it to lack some: nodes that load for
    themselves); nobody sends a block it does not hold at the start of the round; nobody sends more than one block a round, or
    receives more than one except where ``plan.double_receives`` says so. ``holdings``: what nodes hold at the start (default:
    the sources hold everything), and then need not receive.
    """
    _check_shape(plan)
    everything = range(plan.blocks)
    if holdings is None:
        holdings = dict.fromkeys(plan.sources, everything)
    held = {node: set(holdings.get(node, ())) for node in plan.members}
    for number, transfers in enumerate(plan.rounds, start=1):
        _check_ports(plan, number, transfers)
        for t in transfers:
            _check_transfer(number, t, held, plan.blocks)
        for t in transfers:
            if t.block in held[t.dst]:
                raise PlanError(f"round {number}: node {t.dst} gets block {t.block} again")
            held[t.dst].add(t.block)
    if complete:
        for node in plan.destinations:
            lacking = set(everything) - held[node]
            if lacking:
                raise PlanError(f"node {node} never gets block {min(lacking)}")


def _check_shape(plan: MulticastPlan) -> None:
    if plan.blocks < 1:
        raise PlanError(f"a plan needs at least one block, not {plan.blocks}")
    if len(set(plan.members)) != len(plan.members) or plan.members[: len(plan.sources)] != plan.sources:
        raise PlanError(f"members must be distinct and begin with the sources {plan.sources}: {plan.members}")


def _check_ports(plan: MulticastPlan, number: int, transfers: Collection[Send]) -> None:
    node, sends = Counter(t.src for t in transfers).most_common(1)[0] if transfers else (0, 0)
    if sends > 1:
        raise PlanError(f"round {number}: node {node} sends {sends} blocks at once")


def _check_transfer(number: int, t: Send, held: Mapping[NodeId, set[int]], blocks: int) -> None:
    if t.src not in held or t.dst not in held or t.src == t.dst:
        raise PlanError(f"round {number}: a transfer from {t.src} to {t.dst} is not between two members")
    if not 0 <= t.block < blocks:
        raise PlanError(f"round {number}: there is no block {t.block} of {blocks}")
    if t.block not in held[t.src]:
        raise PlanError(f"round {number}: node {t.src} sends block {t.block}, which it does not hold yet")
