"""Hidden states that one stage's node writes into the memory of the next one's, which computes with them where they lie.

The node of a stage offers the node of the stage before a place for each batch in flight. A batch has one iteration under way, and
its next one begins when the last stage has answered: by then every stage has read its inputs, so that a place is free again
without a word. Before an offer has come, or without room for one, hidden states travel in the message itself.

A write cannot be called back. A node that has stopped sending to a place vacates it, behind its last write; the place is given to
somebody else when its own node has stopped reading there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from lambdascale.core import NodeId
from lambdascale.inference.arena import Extents
from lambdascale.live import wire
from lambdascale.live.node.instance import Instance
from lambdascale.live.node.memory import memory_of
from lambdascale.transport import Memory, TransportError

# Sends a message to a node; False if the node is lost.
Tell = Callable[[NodeId, wire.Peer], bool]


class Places(Protocol):
    """The part of an Endpoint that parcels need."""

    def place(self, peer: NodeId, data: Memory, offset: int) -> Future[None]:
        """See Endpoint."""
        ...


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

    ``area``: the part of the endpoint's registered memory, from byte ``first`` on, that places are in; empty: nothing is offered.
    ``place_bytes(model)``: the size of a place, that of the largest iteration's hidden states.
    """

    def __init__(
        self, node: NodeId, endpoint: Places, area: Memory, first: int, place_bytes: Callable[[str], int], tell: Tell
    ) -> None:
        self._node, self._endpoint, self._tell = node, endpoint, tell
        self._area, self._first, self._place_bytes = area, first, place_bytes
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
                place = wire.Offer(instance.number, self._node, instance.newest, batch, self._first + offset, size)
                if not self._tell(sender, place):  # nobody will vacate it: take it back
                    self._extents.give_back(offset)
                    break
                self._offered[offset] = _Offered(sender, instance.number, batch)

    @staticmethod
    def _usable(offered: _Offered, instance: int, sender: NodeId) -> bool:
        return (offered.instance, offered.sender) == (instance, sender) and not (offered.read or offered.vacated)

    def read(self, landed: wire.Landed) -> Memory:
        """Return hidden states that have been written here, in place."""
        begin = landed.offset - self._first
        return self._area[begin : begin + landed.size]

    def vacated(self, message: wire.Vacate) -> None:
        """Take note that a node writes no more to some of the places that it was offered."""
        for offset in message.offsets:
            offered = self._offered.get(offset - self._first)
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
        try:
            done = self._endpoint.place(peer, self._source(hidden), place.offset)
        except TransportError:
            return b""  # the peer is lost: the message will not arrive either
        done.add_done_callback(lambda _, kept=hidden: None)  # type: ignore[misc]  # mypy cannot infer the default; the memory lives until read
        return wire.Landed(place.offset, size)

    def _source(self, hidden: bytes | torch.Tensor) -> Memory:
        """Return hidden states in memory that the endpoint writes from: a GPU's only where peers write to a GPU's."""
        if isinstance(hidden, bytes):
            return memoryview(hidden)
        return memory_of(hidden.cpu() if isinstance(self._area, memoryview) else _computed(hidden))

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


def _computed(hidden: torch.Tensor) -> torch.Tensor:
    """Wait until a tensor has been computed: it is copied from in another stream."""
    if hidden.device.type == "cuda":
        torch.cuda.current_stream(hidden.device).synchronize()
    return hidden


def to_bytes(hidden: bytes | torch.Tensor) -> bytes:
    """Return hidden states as a message carries them."""
    return hidden if isinstance(hidden, bytes) else hidden.cpu().numpy().tobytes()
