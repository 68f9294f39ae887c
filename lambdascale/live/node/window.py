"""Limits of the blocks of a multicast that a node sends, and receives, at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lambdascale.core import NodeId
from lambdascale.core.checks import require


@dataclass(frozen=True)
class Window:
    """Blocks of one multicast that may be under way, in each direction: ``peer`` with each other node, ``node`` in all.

    With a limit for all peers, blocks go in the plan's order, and all wait for the next one. Without it (``node`` None) they go
    in the plan's order for each peer, and a block that cannot go yet keeps no other peer waiting. UserError for a limit below
    one.
    """

    peer: int
    node: int | None = None

    def __post_init__(self) -> None:
        """Validate."""
        require(self.peer > 0 and (self.node is None or self.node > 0), "a window lets at least one block through")

    @property
    def in_order(self) -> bool:
        """True if blocks for all peers wait for the next one of the plan."""
        return self.node is not None

    def has_room(self, peer: NodeId, under_way: Iterable[NodeId]) -> bool:
        """Return True if one more block may be under way with ``peer``; ``under_way``: the peer of each that is."""
        peers = list(under_way)
        return peers.count(peer) < self.peer and (self.node is None or len(peers) < self.node)


#: A paced link carries one block at a time in each direction, in the plan's order: so rounds take what the plan says.
PACED = Window(peer=1, node=1)
#: Without pacing, a peer's next blocks are under way before its last one is through. A limit for all peers together would have
#: two senders of different rounds share a receiver's link while another link idles (tests/mover/test_round_times.py).
UNPACED = Window(peer=3)
