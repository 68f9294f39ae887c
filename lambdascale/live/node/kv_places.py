"""KV of dissolved pipelines, written into the memory of the nodes that take their requests over.

A node with KV for another asks for places there. Its peer grants them one at a time to all that have asked, in turn, as they come
free; the node writes a part of the KV there and says so, and the peer copies it out. So however much KV moves, the places are
all the registered memory that it takes, and nobody waits in a call. Where nothing can be placed, parts travel in messages.

A granted place comes back with its part, with its return by a node that has stopped sending, or when that node is lost: then
nothing of it is written any more. Nothing else ends with an instance: parts are copied out for requests that nobody has any more.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from lambdascale.core import NodeId
from lambdascale.live import wire
from lambdascale.live.node.instance import Instance
from lambdascale.live.node.memory import at_rest, copy_of, to_bytes
from lambdascale.live.node.mode_switch import KvData
from lambdascale.live.node.places import Area, Tell
from lambdascale.live.node.runners import Runner


@dataclass(frozen=True)
class Part:
    """KV of a request in some of the layers of a runner of a dissolved pipeline, as yet in a slot."""

    move: wire.KvMove
    runner: Runner
    layers: range

    @property
    def nbytes(self) -> int:
        """Size of the KV."""
        return self.move.tokens * self.runner.kv_bytes * len(self.layers)

    def read(self) -> bytes | torch.Tensor:
        """Return the KV as a runner takes it."""
        return self.runner.read_kv(self.move.slot, self.move.tokens, self.layers)


def parts_of(pipeline: Instance, moves: Sequence[wire.KvMove], place_bytes: int) -> Iterator[Part]:
    """Yield what this node's stages have of the KV, in parts of as many layers as fit into a place."""
    for move in moves:
        partition = pipeline.partitions.get(move.version)
        for runner in () if partition is None else partition.runners.values():
            step = place_bytes // (move.tokens * runner.kv_bytes) or len(runner.layers)
            for first in range(0, len(runner.layers), step):
                yield Part(move, runner, runner.layers[first : first + step])


class KvLanding:
    """Places of ``place_bytes`` on this node, and who may write there. For the compute thread."""

    def __init__(self, node: NodeId, area: Area, place_bytes: int, tell: Tell) -> None:
        self._node, self._area, self._place_bytes, self._tell = node, area, place_bytes, tell
        self._free = deque(range(0, area.nbytes, place_bytes) if place_bytes else ())
        self._asked: deque[wire.AskForPlaces] = deque()
        self._granted: dict[int, tuple[NodeId, int]] = {}  # by number: the sender, and the place's offset in the area
        self._numbers = count(secrets.randbits(48))

    @property
    def free(self) -> int:
        """Number of places that nobody has."""
        return len(self._free)

    def asked(self, message: wire.AskForPlaces) -> None:
        """Take note that a node needs places."""
        self._asked.append(message)
        self._grant()

    def _grant(self) -> None:
        """Grant the free places to those that have asked, each one in turn."""
        while self._free and self._asked:
            asked = self._asked.popleft()
            if asked.parts < 1:
                continue
            number, offset = next(self._numbers), self._free.popleft()
            if not self._tell(asked.node, wire.Grant(asked.instance, self._node, number, self._area.first + offset)):
                self._free.append(offset)  # the node is lost, and needs nothing any more
                continue
            self._granted[number] = asked.node, offset
            self._asked.append(wire.AskForPlaces(asked.instance, asked.node, asked.parts - 1))

    def take(self, grant: int, landed: wire.Landed) -> bytes | torch.Tensor | None:
        """Copy out what has been written to a granted place, which is free afterwards. None if the grant is void.

        It is void if the connection that it went over has been lost: others may write to the place by now.
        """
        granted = self._granted.get(grant)
        if granted is None or landed.offset != self._area.first + granted[1] or landed.size > self._place_bytes:
            return None
        data = copy_of(self._area.read(landed))
        self.given_back(grant)
        return data

    def given_back(self, grant: int) -> None:
        """Take note that a granted place is not used."""
        granted = self._granted.pop(grant, None)
        if granted is not None:
            self._free.append(granted[1])
            self._grant()

    def lost(self, peer: NodeId) -> None:
        """Take note that a node is lost: it writes nothing any more."""
        self._asked = deque(asked for asked in self._asked if asked.node != peer)
        for number in [number for number, (sender, _) in self._granted.items() if sender == peer]:
            self.given_back(number)


@dataclass
class _Leaving:
    """A dissolved pipeline with KV to send: parts by node, and the runners that have them, open until all is sent."""

    runners: Sequence[Runner]
    parts: dict[NodeId, deque[Part]]


class KvSender:
    """KV of dissolved pipelines on its way to other nodes' places. For the compute thread.

    ``place_bytes``: the size of every node's places, 0 where nothing can be placed. ``bring`` takes KV that stays on this node.
    """

    def __init__(self, node: NodeId, area: Area, place_bytes: int, tell: Tell, bring: Callable[[KvData], None]) -> None:
        self._node, self._area, self._place_bytes = node, area, place_bytes
        self._tell, self._bring = tell, bring
        self._leaving: dict[int, _Leaving] = {}

    def __len__(self) -> int:
        """Number of pipelines with KV to send."""
        return len(self._leaving)

    def leave(self, pipeline: Instance, moves: Sequence[wire.KvMove]) -> None:
        """Send this node's KV of a dissolved pipeline, from which its runners are taken, to the requests' new nodes.

        They are closed when all has been sent, which may be later. If KV cannot be read, no node waits for it.
        """
        try:
            self._leave(pipeline, moves)
        except Exception:
            self._give_up(pipeline.number, {move.node for move in moves})
            raise

    def _leave(self, pipeline: Instance, moves: Sequence[wire.KvMove]) -> None:
        left: dict[NodeId, deque[Part]] = {}
        for part in parts_of(pipeline, moves, self._place_bytes):
            move = part.move
            if move.node == self._node:
                data = at_rest(part.read())
                self._bring(KvData(move.instance, move.request_id, pipeline.number, part.layers, data))
            elif part.nbytes <= self._place_bytes:
                left.setdefault(move.node, deque()).append(part)
            else:
                self._send(pipeline.number, part, to_bytes(part.read()))
        leaving = _Leaving(pipeline.take_runners(), left)
        self._leaving[pipeline.number] = leaving
        for node, parts in list(left.items()):
            if not self._tell(node, wire.AskForPlaces(pipeline.number, self._node, len(parts))):
                del left[node]
        self._close_if_sent(pipeline.number)

    def granted(self, message: wire.Grant) -> None:
        """Write a part to the place granted for it. If that fails, no node waits for the pipeline's KV any more."""
        leaving = self._leaving.get(message.instance)
        parts = None if leaving is None else leaving.parts.get(message.node)
        if leaving is None or not parts:
            self._tell(message.node, wire.GiveBack(message.instance, message.number))
            return
        part = parts.popleft()
        try:
            landed = self._area.write(message.node, part.read(), message.offset)
        except Exception:
            self._tell(message.node, wire.GiveBack(message.instance, message.number))
            self._give_up(message.instance, set(leaving.parts))
            raise
        if landed is not None:
            self._send(message.instance, part, landed, message.number)
        self._close_if_sent(message.instance)

    def _send(self, pipeline: int, part: Part, data: bytes | wire.Landed, grant: int = -1) -> None:
        move, layers = part.move, part.layers
        message = wire.KvPart(move.instance, move.request_id, pipeline, layers.start, len(layers), data, grant)
        self._tell(move.node, message)

    def _close_if_sent(self, pipeline: int) -> None:
        if not any(self._leaving[pipeline].parts.values()):
            self.stop(pipeline)

    def _give_up(self, pipeline: int, nodes: Iterable[NodeId]) -> None:
        for node in sorted(nodes):
            self._tell(node, wire.NoMoreKv(pipeline))
        self.stop(pipeline)

    def stop(self, pipeline: int) -> None:
        """Send no more of a pipeline's KV, and close its runners."""
        leaving = self._leaving.pop(pipeline, None)
        for runner in () if leaving is None else leaving.runners:
            runner.close()

    def lost(self, peer: NodeId) -> None:
        """Send nothing more to a node that is lost."""
        for pipeline, leaving in list(self._leaving.items()):
            leaving.parts.pop(peer, None)
            self._close_if_sent(pipeline)

    def close(self) -> None:
        """Close the runners of all pipelines."""
        for pipeline in list(self._leaving):
            self.stop(pipeline)


class KvTraffic:
    """KV that comes to a node and leaves it, part by part. See KvLanding and KvSender.

    ``bring`` takes what has come; ``no_more`` hears of pipelines of which nothing more will come.
    """

    def __init__(
        self,
        node: NodeId,
        area: Area,
        place_bytes: int,
        tell: Tell,
        bring: Callable[[KvData], None],
        no_more: Callable[[int], None],
    ) -> None:
        self.landing = KvLanding(node, area, place_bytes, tell)
        self.sender = KvSender(node, area, place_bytes, tell, bring)
        self._bring = bring
        self._no_more = no_more

    def take(self, message: wire.OfKv) -> None:
        """Take a message of another node."""
        match message:
            case wire.AskForPlaces():
                self.landing.asked(message)
            case wire.Grant():
                self.sender.granted(message)
            case wire.GiveBack():
                self.landing.given_back(message.number)
            case wire.KvPart():
                self._came(message)
            case wire.NoMoreKv():
                self._no_more(message.instance)

    def _came(self, part: wire.KvPart) -> None:
        data = self.landing.take(part.grant, part.data) if isinstance(part.data, wire.Landed) else part.data
        if data is not None:
            layers = range(part.first_layer, part.first_layer + part.layers)
            self._bring(KvData(part.instance, part.request_id, part.pipeline, layers, data))

    def lost(self, peer: NodeId) -> None:
        """Take note that a node is lost."""
        self.landing.lost(peer)
        self.sender.lost(peer)
