"""KV of dissolved pipelines, and of batches that move to other stages, written into the memory of the nodes that take it over.

A node with KV for another asks for places there. Its peer grants them one at a time to all that have asked, in turn, as they come
free; the node writes a part of the KV there and says so, and the peer copies it out. So however much KV moves, the places are
all the registered memory that it takes, and nobody waits in a call. Where nothing can be placed, parts travel in messages.

A granted place comes back with its part, with its return by a node that has stopped sending, or when that node is lost: then
nothing of it is written any more. Nothing else ends with an instance: parts are copied out for requests that nobody has any more.
"""

from __future__ import annotations

import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch

from lambdascale.core import NodeId
from lambdascale.core.kv_path import layers_of_part
from lambdascale.live import wire
from lambdascale.live.node.instance import Instance, SlotData
from lambdascale.live.node.memory import at_rest, copy_of, to_bytes
from lambdascale.live.node.mode_switch import KvData
from lambdascale.live.node.places import Area, Tell
from lambdascale.live.node.runners import Runner

# From a part, its KV or the place where it has been written, and that place's grant to what tells its new node of it.
Message = Callable[["Part", bytes | wire.Landed, int], wire.Peer]


@dataclass(frozen=True)
class Part:
    """KV of a slot's first ``tokens`` tokens in some of a runner's layers."""

    runner: Runner
    layers: range
    slot: int
    tokens: int
    message: Message

    @property
    def nbytes(self) -> int:
        """Size of the KV."""
        return self.tokens * self.runner.kv_bytes * len(self.layers)

    def read(self) -> bytes | torch.Tensor:
        """Return the KV as a runner takes it."""
        return self.runner.read_kv(self.slot, self.tokens, self.layers)


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
        """Copy out what has been written to a granted place, which is free afterwards, also if that fails. None for a void grant.

        It is void if the connection that it went over has been lost: others may write to the place by now.
        """
        granted = self._granted.get(grant)
        if granted is None or landed.offset != self._area.first + granted[1] or landed.size > self._place_bytes:
            return None
        try:
            return copy_of(self._area.read(landed))
        finally:
            self.given_back(grant)

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
class _Sending:
    """Parts of an instance's KV by node. ``ends`` are called when all is sent, or no more will be.

    ``dissolved``: of a pipeline that is no more.
    """

    dissolved: bool
    parts: dict[NodeId, deque[Part]] = field(default_factory=dict)
    ends: list[Callable[[], None]] = field(default_factory=list)


class KvSender:
    """KV of dissolved pipelines, and of batches that move, on its way to other nodes' places. For the compute thread.

    ``place_bytes``: the size of every node's places, 0 where nothing can be placed. ``bring`` takes KV of a dissolved pipeline
    that stays on this node.
    """

    def __init__(self, node: NodeId, area: Area, place_bytes: int, tell: Tell, bring: Callable[[KvData], None]) -> None:
        self._node, self._area, self._place_bytes = node, area, place_bytes
        self._tell, self._bring = tell, bring
        # By instance. One that is dissolved is collected when all that its batches' moves owe has been sent (see Instance).
        self._sending: dict[int, _Sending] = {}

    def __len__(self) -> int:
        """Number of instances with KV to send."""
        return len(self._sending)

    @property
    def dissolved(self) -> bool:
        """True if KV of a dissolved pipeline is still to be sent: its runners have their memory."""
        return any(sending.dissolved for sending in self._sending.values())

    def parts(self, runner: Runner, layers: range, slot: int, tokens: int, message: Message) -> Iterator[Part]:
        """Yield a slot's KV in parts of as many layers as fit into a place."""
        step = layers_of_part(self._place_bytes, tokens * runner.kv_bytes) or len(layers)
        for first in range(0, len(layers), step):
            yield Part(runner, layers[first : first + step], slot, tokens, message)

    def send(self, instance: int, parts: Mapping[NodeId, Iterable[Part]], end: Callable[[], None]) -> None:
        """Send KV that a batch's move takes to other nodes. Call ``end`` when all is sent, or no more will be."""
        sending = self._sending.setdefault(instance, _Sending(dissolved=False))
        assert not sending.dissolved, "batches of dissolved pipelines do not move"
        sending.ends.append(end)
        self._ask(instance, sending, parts)
        self._end_if_sent(instance)

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
        left: dict[NodeId, list[Part]] = defaultdict(list)
        for move in moves:
            partition = pipeline.partitions.get(move.version)
            for runner in () if partition is None else partition.runners.values():
                message = partial(_part_of, move, pipeline.number)
                for part in self.parts(runner, runner.layers, move.slot, move.tokens, message):
                    if move.node == self._node:
                        data = at_rest(part.read())
                        self._bring(KvData(move.instance, move.request_id, pipeline.number, part.layers, data))
                    else:
                        left[move.node].append(part)
        sending = self._sending[pipeline.number] = _Sending(dissolved=True)
        sending.ends.append(partial(_close, pipeline.take_runners()))
        self._ask(pipeline.number, sending, left)
        self._end_if_sent(pipeline.number)

    def _ask(self, instance: int, sending: _Sending, parts: Mapping[NodeId, Iterable[Part]]) -> None:
        """Ask for places for parts; send at once what no place has room for."""
        for node, each in parts.items():
            fitting = [part for part in each if not self._send_if_large(node, part)]
            if fitting and self._tell(node, wire.AskForPlaces(instance, self._node, len(fitting))):
                sending.parts.setdefault(node, deque()).extend(fitting)

    def _send_if_large(self, node: NodeId, part: Part) -> bool:
        if part.nbytes <= self._place_bytes:
            return False
        self._tell(node, part.message(part, to_bytes(part.read()), -1))
        return True

    def granted(self, message: wire.Grant) -> None:
        """Write a part to the place granted for it. If that fails, no node waits for a dissolved pipeline's KV any more."""
        sending = self._sending.get(message.instance)
        parts = None if sending is None else sending.parts.get(message.node)
        if sending is None or not parts:
            self._tell(message.node, wire.GiveBack(message.instance, message.number))
            return
        part = parts.popleft()
        try:
            landed = self._area.write(message.node, part.read(), message.offset)
        except Exception:
            self._tell(message.node, wire.GiveBack(message.instance, message.number))
            if sending.dissolved:
                self._give_up(message.instance, set(sending.parts))
            raise
        if landed is not None:
            self._tell(message.node, part.message(part, landed, message.number))
        self._end_if_sent(message.instance)

    def _end_if_sent(self, instance: int) -> None:
        if not any(self._sending[instance].parts.values()):
            self.stop(instance)

    def _give_up(self, pipeline: int, nodes: Iterable[NodeId]) -> None:
        for node in sorted(nodes):
            self._tell(node, wire.NoMoreKv(pipeline))
        self.stop(pipeline)

    def stop(self, instance: int) -> None:
        """Send no more of an instance's KV."""
        sending = self._sending.pop(instance, None)
        for end in () if sending is None else sending.ends:
            end()

    def forget(self, instance: int) -> None:
        """Send no more of the KV that moves of an instance's batches take along: the instance ends. A dissolved one's goes on."""
        sending = self._sending.get(instance)
        if sending is not None and not sending.dissolved:
            self.stop(instance)

    def lost(self, peer: NodeId) -> None:
        """Send nothing more to a node that is lost."""
        for instance, sending in list(self._sending.items()):
            sending.parts.pop(peer, None)
            self._end_if_sent(instance)

    def close(self) -> None:
        """Send nothing more."""
        for instance in list(self._sending):
            self.stop(instance)


def _part_of(move: wire.KvMove, pipeline: int, part: Part, data: bytes | wire.Landed, grant: int) -> wire.Peer:
    return wire.KvPart(move.instance, move.request_id, pipeline, part.layers.start, len(part.layers), data, grant)


def _close(runners: Sequence[Runner]) -> None:
    for runner in runners:
        runner.close()


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

    def arrived(self, part: wire.SlotKv) -> SlotData | None:
        """Copy out KV for a batch that moves. None if it is void (see KvLanding)."""
        data = self._data(part)
        layers = range(part.first_layer, part.first_layer + part.layers)
        return None if data is None else SlotData(part.instance, part.batch, part.version, part.slot, layers, data)

    def _data(self, part: wire.KvPart | wire.SlotKv) -> bytes | torch.Tensor | None:
        return self.landing.take(part.grant, part.data) if isinstance(part.data, wire.Landed) else part.data

    def _came(self, part: wire.KvPart) -> None:
        data = self._data(part)
        if data is not None:
            layers = range(part.first_layer, part.first_layer + part.layers)
            self._bring(KvData(part.instance, part.request_id, part.pipeline, layers, data))

    def lost(self, peer: NodeId) -> None:
        """Take note that a node is lost."""
        self.landing.lost(peer)
        self.sender.lost(peer)
