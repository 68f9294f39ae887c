"""Hidden states that one stage's node writes into the memory of the next one's, which computes with them where they lie.

The node of a stage offers the node of the stage before a place for each batch in flight. A batch has one iteration under way, and
its next one begins when the last stage has answered: by then every stage has read its inputs, so that a place is free again
without a word. Before an offer has come, or without room for one, hidden states travel in the message itself.

A write cannot be called back. A node that has stopped sending to a place vacates it, behind its last write; the place is given to
somebody else when its own node has stopped reading there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from lambdascale.core import NodeId
from lambdascale.inference.arena import Extents
from lambdascale.live import wire
from lambdascale.live.node.instance import Instance
from lambdascale.live.node.memory import to_bytes
from lambdascale.live.node.places import Area, Tell
from lambdascale.transport import Memory


@dataclass
class _Offered:
    """A place on this node: who may write there, for which batch, and who has done with it."""

    sender: NodeId
    instance: int
    batch: int
    read: bool = False  # this node reads there no more
    vacated: bool = False  # the sender writes there no more


class Parcels:
    """A node's places and those that others offer it. For the compute thread.

    ``area``: the memory that places are in; empty: nothing is offered. ``place_bytes(model)``: the size of a place, that of the
    largest iteration's hidden states.
    """

    def __init__(self, node: NodeId, area: Area, place_bytes: Callable[[str], int], tell: Tell) -> None:
        self._node, self._area, self._place_bytes, self._tell = node, area, place_bytes, tell
        self._extents = Extents(area.nbytes)
        self._offered: dict[int, _Offered] = {}  # by offset in the area
        self._places: dict[tuple[int, NodeId, int], wire.Offer] = {}  # others', by instance, node and batch

    @property
    def free_bytes(self) -> int:
        """Bytes of the area that no place has."""
        return self._extents.free_bytes

    # -- places on this node -----------------------------------------------------------------------------------------

    def offer(self, instance: Instance) -> None:
        """Offer places to the nodes whose stages come before this node's in the instance's newest partition, as room allows."""
        size = self._place_bytes(instance.model)
        for sender in sorted(_before(instance, self._node, instance.newest)):
            have = {o.batch for o in self._offered.values() if self._usable(o, instance.number, sender)}
            for batch in sorted(set(range(instance.batches)) - have):
                offset = self._extents.take(size)
                if offset is None:
                    return
                place = wire.Offer(instance.number, self._node, instance.newest, batch, self._area.first + offset, size)
                if not self._tell(sender, place):  # nobody will vacate it: take it back
                    self._extents.give_back(offset)
                    break
                self._offered[offset] = _Offered(sender, instance.number, batch)

    @staticmethod
    def _usable(offered: _Offered, instance: int, sender: NodeId) -> bool:
        return (offered.instance, offered.sender) == (instance, sender) and not (offered.read or offered.vacated)

    def read(self, landed: wire.Landed) -> Memory:
        """Return hidden states that have been written here, in place."""
        return self._area.read(landed)

    def vacated(self, message: wire.Vacate) -> None:
        """Take note that a node writes no more to some of the places that it was offered."""
        for offset in message.offsets:
            offered = self._offered.get(offset - self._area.first)
            if offered is not None and (offered.instance, offered.sender) == (message.instance, message.node):
                offered.vacated = True
        self._reclaim()

    def _reclaim(self) -> None:
        for offset in [offset for offset, offered in self._offered.items() if offered.read and offered.vacated]:
            del self._offered[offset]
            self._extents.give_back(offset)

    # -- places on other nodes ---------------------------------------------------------------------------------------

    def refuse(self, message: wire.ForInstance) -> None:
        """Drop a message of an instance that has ended here; places that it offers stay empty."""
        if isinstance(message, wire.Offer):
            self._vacate(message.node, message.instance, [message])

    def offered(self, message: wire.Offer) -> None:
        """Take note of an offer for an instance that this node serves."""
        key = (message.instance, message.node, message.batch)
        before = self._places.get(key)
        self._places[key] = message
        if before is not None:
            self._vacate(message.node, message.instance, [before])

    def send(self, peer: NodeId, instance: int, batch: int, hidden: bytes | torch.Tensor) -> bytes | wire.Landed:
        """Write hidden states to their place at ``peer``. Returns what the next message carries: place or bytes."""
        place = self._places.get((instance, peer, batch))
        size = len(hidden) if isinstance(hidden, bytes) else hidden.nbytes
        if place is None or size > place.size:
            return to_bytes(hidden)
        landed = self._area.write(peer, hidden, place.offset)
        return b"" if landed is None else landed  # the peer is lost: the message will not arrive either

    def _vacate(self, node: NodeId, instance: int, places: Collection[wire.Offer]) -> None:
        self._tell(node, wire.Vacate(instance, self._node, tuple(place.offset for place in places)))

    # -- ends --------------------------------------------------------------------------------------------------------

    def settle(self, instance: Instance) -> None:
        """Vacate the places that no partition left of an instance writes to, and give up those that none reads."""
        number, versions = instance.number, list(instance.partitions)
        readers = {node for version in versions for node in _after(instance, self._node, version)}
        senders = {node for version in versions for node in _before(instance, self._node, version)}
        left: dict[NodeId, list[wire.Offer]] = {}
        for key, place in list(self._places.items()):
            known = not versions or place.version <= instance.newest
            if key[0] == number and key[1] not in readers and known:
                left.setdefault(key[1], []).append(self._places.pop(key))
        for node, places in left.items():
            self._vacate(node, number, places)
        for offered in self._offered.values():
            if offered.instance == number and offered.sender not in senders:
                offered.read = True
        self._reclaim()

    def lost(self, peer: NodeId) -> None:
        """Take note that a node is lost: it writes nothing any more, and nothing can be written to it."""
        self._places = {key: place for key, place in self._places.items() if key[1] != peer}
        for offered in self._offered.values():
            offered.vacated = offered.vacated or offered.sender == peer
        self._reclaim()


def _before(instance: Instance, node: NodeId, version: int) -> set[NodeId]:
    """Return the other nodes whose stages come right before ``node``'s in a partition."""
    return {before for before, after in _neighbours(instance, version) if after == node}


def _after(instance: Instance, node: NodeId, version: int) -> set[NodeId]:
    """Return the other nodes whose stages come right after ``node``'s in a partition."""
    return {after for before, after in _neighbours(instance, version) if before == node}


def _neighbours(instance: Instance, version: int) -> Iterator[tuple[NodeId, NodeId]]:
    nodes = [stage.node for stage in instance.partitions[version].stages]
    return ((before, after) for before, after in pairwise(nodes) if before != after)
