"""The binomial pipeline for any number of nodes, and λScale's k-way transmission built from it (paper, sections 4.2 and 4.3).

The schedule of one sub-group runs on a hypercube of 2^m vertices, m = floor(log2 n). The source is vertex 0; every other
vertex is one node or a pair of nodes. In round t every vertex exchanges with its neighbour along dimension t mod m: the
source sends block min(t, b-1), every other vertex the latest block (in injection order) that it holds and the neighbour lacks.
That ends after b + m - 1 rounds.

A pair acts as one vertex and mirrors within itself. Each of its nodes may hold at most one block the other lacks: in a round
the node that has the block due to go out sends it, the other one mirrors its own unmirrored block, and the block that comes
in goes to the node that does not receive a mirrored one. So the bound of one holds from round to round, no node sends or
receives twice in a round, and one more round evens out what is left: b + ceil(log2 n) - 1 rounds, the lower bound, for every n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lambdascale.core import MulticastPlan, PlanError, Send
from lambdascale.core.checks import check_types
from lambdascale.multicast.grouping import Chunks, Order, injection_orders, near_equal_groups

# (sender, receiver, position in the injection order), per round, nodes counted from 0 (the source).
_Schedule = tuple[tuple[tuple[int, int, int], ...], ...]


@dataclass(frozen=True, kw_only=True)
class BinomialPipeline:
    """λScale's planner. Every source gets a sub-group, up to one per destination.

    ``order`` and ``chunks`` determine the order in which a sub-group's source injects the blocks (see ``injection_orders``).
    Rounds: b + ceil(log2(size of the largest sub-group)) - 1, the source counted in; sends: b per destination; no node
    sends or receives more than one block a round.
    """

    order: Order = "shift"
    chunks: Chunks = "contiguous"

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """See MulticastPlanner. Sources beyond the number of destinations take no part but stay members."""
        check_counts(sources, destinations, blocks)
        return _plan(sources, destinations, blocks, self.order, self.chunks)


def check_counts(sources: int, destinations: int, blocks: int) -> None:
    """Raise PlanError for fewer than one source or block, or a negative number of destinations."""
    for what, count, least in (("sources", sources, 1), ("destinations", destinations, 0), ("blocks", blocks, 1)):
        if count < least:
            raise PlanError(f"a multicast needs at least {least} {what}, not {count}")


@lru_cache(maxsize=256)
def _plan(sources: int, destinations: int, blocks: int, order: Order, chunks: Chunks) -> MulticastPlan:
    groups = near_equal_groups(sources, destinations)
    orders = injection_orders(blocks, len(groups), order, chunks)
    rounds: list[list[Send]] = []
    for group, injected in zip(groups, orders, strict=True):
        schedule = _schedule(len(group), blocks)
        rounds += [[] for _ in range(len(schedule) - len(rounds))]
        for sends, moves in zip(rounds, schedule, strict=False):
            sends += [Send(group[src], group[dst], injected[position]) for src, dst, position in moves]
    return MulticastPlan(
        members=tuple(range(sources + destinations)),
        sources=tuple(range(sources)),
        blocks=blocks,
        rounds=tuple(tuple(sends) for sends in rounds),
        groups=groups,
        orders=orders,
    )


@lru_cache(maxsize=256)
def _schedule(nodes: int, blocks: int) -> _Schedule:
    """Return the rounds of one sub-group of ``nodes`` nodes (source included)."""
    if nodes == 1:
        return ()
    dimensions = nodes.bit_length() - 1
    vertices = _vertices(nodes, 1 << dimensions)
    total = blocks + dimensions - 1
    rounds = [_round(vertices, 1 << number % dimensions, min(number, blocks - 1)) for number in range(total)]
    if nodes != 1 << dimensions:
        rounds.append(tuple(move for vertex in vertices for move in vertex.even_out()))
    return tuple(rounds)


class _Vertex:
    """A node, or a pair of nodes that mirror to each other. ``held`` and ``alone`` are bit sets of injection positions."""

    __slots__ = ("alone", "held", "nodes")

    def __init__(self, nodes: tuple[int, ...], held: int = 0) -> None:
        self.nodes = nodes
        self.held = held
        # Per node: the blocks only this one of the pair holds; never more than one.
        self.alone = [0, 0]

    def sender_of(self, block: int) -> int:
        """Return the node (0 or 1) that sends ``block`` out: the one that holds it alone, else the one with nothing to mirror."""
        if len(self.nodes) == 1 or self.alone[0] >> block & 1:
            return 0
        if self.alone[1] >> block & 1:
            return 1
        return 0 if not self.alone[0] else 1

    def mirror(self, sender: int | None, *, both: bool) -> list[tuple[int, int, int]]:
        """Return sends of unmirrored blocks, none from ``sender``; one way only unless ``both`` may receive."""
        if not any(self.alone):
            return []
        sides = [side for side in (0, 1) if side != sender and self.alone[side]]
        return [
            (self.nodes[side], self.nodes[1 - side], self.alone[side].bit_length() - 1) for side in (sides if both else sides[:1])
        ]

    def even_out(self) -> list[tuple[int, int, int]]:
        """Return the mirroring sends of the last round."""
        return self.mirror(None, both=True)

    def apply(self, mirrored: Sequence[tuple[int, int, int]], received: int | None) -> int:
        """Note a round's mirroring and the block that came in; return the node (0 or 1) that received the latter."""
        for src, _, _ in mirrored:
            self.alone[self.nodes.index(src)] = 0
        if received is None:
            return 0
        self.held |= 1 << received
        if len(self.nodes) == 1:
            return 0
        busy = {self.nodes.index(dst) for _, dst, _ in mirrored}
        side = min((0, 1), key=lambda s: (s in busy, self.alone[s] != 0, s))
        assert not self.alone[side], "a node holds at most one block its mirror lacks"
        self.alone[side] = 1 << received
        return side


def _vertices(nodes: int, count: int) -> list[_Vertex]:
    """Node 0 alone at vertex 0; nodes 1..count-1 at the others, the rest as their second halves."""
    pairs = [_Vertex((node, node + count - 1) if node + count - 1 < nodes else (node,)) for node in range(1, count)]
    return [_Vertex((0,)), *pairs]


def _round(vertices: list[_Vertex], bit: int, injected: int) -> tuple[tuple[int, int, int], ...]:
    vertices[0].held |= 1 << injected
    sends: list[int | None] = []
    for index, vertex in enumerate(vertices):
        missing = vertex.held & ~vertices[index ^ bit].held
        sends.append(missing.bit_length() - 1 if missing else None)
    moves: list[tuple[int, int, int]] = []
    receivers: list[int] = []
    senders: list[int] = []
    for index, vertex in enumerate(vertices):
        block, incoming = sends[index], sends[index ^ bit]
        sender = None if block is None else vertex.sender_of(block)
        mirrored = vertex.mirror(sender, both=incoming is None)
        moves += mirrored
        senders.append(vertex.nodes[sender or 0])
        receivers.append(vertex.nodes[vertex.apply(mirrored, incoming)])
    for index, block in enumerate(sends):
        if block is not None:
            moves.append((senders[index], receivers[index ^ bit], block))
    return tuple(moves)
