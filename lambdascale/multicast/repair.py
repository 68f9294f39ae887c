"""Plans for the survivors of a broken multicast, from the blocks they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from lambdascale.core import MulticastPlan, NodeId, PlanError, Send


def plan_from_holdings(holdings: Mapping[NodeId, Collection[int]], destinations: Sequence[NodeId], blocks: int) -> MulticastPlan:
    """Return a plan over real node ids that brings every destination the blocks it lacks.

    Greedy: in every round each receiver in turn (the one lacking most first) takes the block that the fewest nodes hold, from the
    idle holder that has sent least; one send and one receive a round per node. ``sources`` of the plan are the holders that are
    no destinations and do send. PlanError if no node holds a block that is lacking.
    """
    destinations = tuple(dict.fromkeys(destinations))
    held = {node: set(blocks_held) for node, blocks_held in holdings.items()}
    for node in destinations:
        held.setdefault(node, set())
    copies = Counter(block for blocks_held in held.values() for block in blocks_held)
    lost = [block for block in range(blocks) if not copies[block]]
    if lost and destinations:
        raise PlanError(f"no survivor holds block {lost[0]}")
    sent: Counter[NodeId] = Counter()
    rounds: list[tuple[Send, ...]] = []
    while sends := _greedy_round(held, destinations, blocks, copies, sent):
        for send in sends:
            held[send.dst].add(send.block)
            copies[send.block] += 1
            sent[send.src] += 1
        rounds.append(sends)
    sources = tuple(node for node in sorted(held) if node not in destinations and sent[node])
    members = sources + destinations
    return MulticastPlan(members=members, sources=sources, blocks=blocks, rounds=tuple(rounds), groups=(members,))


def _greedy_round(
    held: Mapping[NodeId, set[int]],
    destinations: Sequence[NodeId],
    blocks: int,
    copies: Mapping[int, int],
    sent: Mapping[NodeId, int],
) -> tuple[Send, ...]:
    idle = set(held)
    sends = []
    for receiver in sorted(destinations, key=lambda node: (len(held[node]), node)):
        for block in sorted(set(range(blocks)) - held[receiver], key=lambda b: (copies[b], b)):
            holders = [node for node in idle if node != receiver and block in held[node]]
            if holders:
                sender = min(holders, key=lambda node: (sent[node], node))
                idle.discard(sender)
                sends.append(Send(sender, receiver, block))
                break
    return tuple(sends)
