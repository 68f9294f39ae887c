"""Multicast trees: the root sends the blocks in order; every node sends each block to its children in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lambdascale.core import MulticastPlan, PlanError, Send
from lambdascale.multicast import check_counts, near_equal_groups

# The prototype's tree: levels [0], [1], [2, 3], [4-6], [7-11] (reference, section 4).
_PROTOTYPE_PARENTS = {1: 0, 2: 1, 3: 0, 4: 2, 5: 1, 6: 3, 7: 4, 8: 2, 9: 5, 10: 6, 11: 3}


# Children of a node in the order of their turns; None: the turn of a child beyond the tree's size.
_Children = Sequence[Sequence[int | None]]


@dataclass(frozen=True, kw_only=True)
class BalancedTree:
    """FaaSNet's balanced binary function tree for any number of nodes; node i's children are 2i + 1 and 2i + 2.

    Each node makes one send per round, each block first to the left child, then to the right. About 2b + depth rounds for
    b blocks. With several sources, destinations are split evenly among as many trees.
    """

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """See MulticastPlanner; PlanError for invalid counts."""
        return _plan(sources, destinations, blocks, _balanced_children)


@dataclass(frozen=True, kw_only=True)
class PrototypeTree:
    """The λScale prototype's FaaSNet: one fixed tree for up to 12 nodes.

    A node alternates between its children of the full tree, and lets the turn of one beyond the tree's size pass; not so with
    only two nodes: 16 rounds for 2 nodes and 16 blocks, 32 for 3 and 4, 33 for 5 to 7, 34 for 8 to 12 (reference, section 4).
    """

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """See MulticastPlanner; PlanError for invalid counts or a tree of more than 12 nodes."""
        return _plan(sources, destinations, blocks, _prototype_children)


def _balanced_children(nodes: int) -> _Children:
    return [[child for child in (2 * node + 1, 2 * node + 2) if child < nodes] for node in range(nodes)]


def _prototype_children(nodes: int) -> _Children:
    if nodes > len(_PROTOTYPE_PARENTS) + 1:
        raise PlanError(f"the prototype's FaaSNet tree has 12 nodes, not {nodes}; use system=faasnet for more")
    children = [[child for child, parent in _PROTOTYPE_PARENTS.items() if parent == node] for node in range(nodes)]
    if nodes == 2:
        return [[1], []]
    return [[child if child < nodes else None for child in of_node] for of_node in children]


@lru_cache(maxsize=256)
def _plan(sources: int, destinations: int, blocks: int, tree: Callable[[int], _Children]) -> MulticastPlan:
    check_counts(sources, destinations, blocks)
    groups = near_equal_groups(sources, destinations)
    rounds: list[list[Send]] = []
    for group in groups:
        for number, sends in enumerate(_tree_rounds(tree(len(group)), blocks)):
            if number == len(rounds):
                rounds.append([])
            rounds[number] += [Send(group[s.src], group[s.dst], s.block) for s in sends]
    return MulticastPlan(
        members=tuple(range(sources + destinations)),
        sources=tuple(range(sources)),
        blocks=blocks,
        rounds=tuple(tuple(sends) for sends in rounds),
        groups=groups,
        orders=(tuple(range(blocks)),) * len(groups),
    )


def _tree_rounds(children: _Children, blocks: int) -> list[list[Send]]:
    """Rounds in which every node sends block 0 to each child, then block 1, ..., once it holds them: one turn per round."""
    turns = [deque((block, child) for block in range(blocks) for child in of_node) for of_node in children]
    held = [blocks, *(0 for _ in children[1:])]
    rounds: list[list[Send]] = []
    while any(turns):
        ready = [(node, queue.popleft()) for node, queue in enumerate(turns) if queue and queue[0][0] < held[node]]
        sends = [Send(node, child, block) for node, (block, child) in ready if child is not None]
        for t in sends:
            held[t.dst] += 1
        rounds.append(sends)
    while rounds and not rounds[-1]:
        rounds.pop()
    return rounds
