"""The validator of multicast plans, and the rounds in which blocks arrive according to a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from lambdascale.core import MulticastPlan, NodeId, PlanError, Send

Holdings = Mapping[NodeId, Collection[int]]


def arrival_rounds(plan: MulticastPlan) -> dict[NodeId, dict[int, int]]:
    """Return for every receiving node: block -> the round (from 1) in which it arrives. The plan is not validated."""
    arrivals: dict[NodeId, dict[int, int]] = {node: {} for node in plan.destinations}
    for number, sends in enumerate(plan.rounds, start=1):
        for send in sends:
            if send.dst not in arrivals:
                arrivals[send.dst] = {}
            arrivals[send.dst][send.block] = number
    return arrivals


def completion_rounds(plan: MulticastPlan) -> dict[NodeId, int]:
    """Return for every destination the round (from 1) after which it has received all its blocks; 0 if it receives none."""
    arrivals = arrival_rounds(plan)
    return {node: max(arrivals[node].values(), default=0) for node in plan.destinations}


def validate_plan(plan: MulticastPlan, *, holdings: Holdings | None = None) -> None:
    """Raise PlanError, naming round, node and block, unless the plan is valid.

    Every destination gets every block exactly once; no node sends a block that it does not hold at the start of the round; no
    node sends more than one block a round; a node receives two blocks in exactly the rounds that ``plan.double_receives``
    declares, and at most one in all others. ``holdings``: the blocks that nodes hold at the start and need not receive (default:
    the sources hold everything).
    """
    _check_shape(plan)
    declared = frozenset(plan.double_receives)
    everything = range(plan.blocks)
    if holdings is None:
        holdings = dict.fromkeys(plan.sources, everything)
    held = {node: set(holdings.get(node, ())) for node in plan.members}
    for number, sends in enumerate(plan.rounds, start=1):
        for send in sends:
            _check_send(number, send, held, plan.blocks)
        _check_ports(number, sends, {node for in_round, node in declared if in_round == number})
        for send in sends:
            if send.block in held[send.dst]:
                raise PlanError(f"round {number}: node {send.dst} gets block {send.block} again")
            held[send.dst].add(send.block)
    for node in plan.destinations:
        lacking = set(everything) - held[node]
        if lacking:
            raise PlanError(f"node {node} never gets block {min(lacking)}")


def _check_shape(plan: MulticastPlan) -> None:
    if plan.blocks < 1:
        raise PlanError(f"a plan needs at least one block, not {plan.blocks}")
    if len(set(plan.members)) != len(plan.members) or plan.members[: len(plan.sources)] != plan.sources:
        raise PlanError(f"members must be distinct and begin with the sources {plan.sources}: {plan.members}")
    if len(set(plan.double_receives)) != len(plan.double_receives):
        raise PlanError(f"a double receive is declared twice: {plan.double_receives}")
    for number, node in plan.double_receives:
        if node not in plan.members or not 1 <= number <= len(plan.rounds):
            raise PlanError(f"round {number}: the double receive of node {node} is declared outside the plan")


def _check_ports(number: int, sends: Collection[Send], declared: Collection[NodeId]) -> None:
    for node, count in Counter(send.src for send in sends).items():
        if count > 1:
            raise PlanError(f"round {number}: node {node} sends {count} blocks at once")
    receives = Counter(send.dst for send in sends)
    for node in sorted({*receives, *declared}):
        received, declares = receives[node], 2 if node in declared else 1
        if received > declares or (node in declared and received < declares):
            raise PlanError(f"round {number}: node {node} receives {received} blocks at once, the plan declares {declares}")


def _check_send(number: int, send: Send, held: Mapping[NodeId, set[int]], blocks: int) -> None:
    if send.src not in held or send.dst not in held or send.src == send.dst:
        raise PlanError(f"round {number}: a send from {send.src} to {send.dst} is not between two members")
    if not 0 <= send.block < blocks:
        raise PlanError(f"round {number}: block {send.block} does not exist: the model has {blocks}")
    if send.block not in held[send.src]:
        raise PlanError(f"round {number}: node {send.src} sends block {send.block}, which it does not hold yet")
