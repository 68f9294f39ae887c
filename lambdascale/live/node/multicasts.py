"""A node's part in multicasts: it carries whole plans out by itself.

Every node sends and receives its own transfers in the plan's order: a receiver says whose turn it is and where it wants the
block, the sender writes as soon as it holds it; nobody asks the controller. So later rounds never overtake earlier ones, and a
paced link carries one block at a time in each direction. A block is verified before it counts and before it is passed on.

A one-sided write cannot be called back. So a cancelled multicast keeps its receivers' memory until every sender whose turn it was
has written or has said that it writes no more (a fence: an empty write behind all others).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch

from lambdascale.core import NodeId
from lambdascale.core.commands import StartMulticast, Tier
from lambdascale.core.plan import Send
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockStore
from lambdascale.live.node.reports import Reports
from lambdascale.live.wire import Ready, encode
from lambdascale.transport import DeviceMemory, Endpoint, Memory, TransportError, gpu_of

BLOCK_BITS = 24
_FENCE = (1 << BLOCK_BITS) - 1


@dataclass
class _Outgoing:
    """What this node sends in a multicast."""

    command: StartMulticast
    tier: StoreTier
    sends: deque[Send]
    in_flight: int = 0
    cancelled: bool = False


@dataclass
class _Incoming:
    """What this node receives in a multicast: where to, in which order, and who may write which block now."""

    command: StartMulticast
    missing: set[int]
    offsets: dict[int, int] = field(default_factory=dict)
    turns: deque[Send] = field(default_factory=deque)
    granted: dict[int, NodeId] = field(default_factory=dict)
    cancelled: bool = False
    admitted: tuple[NodeId, ...] = ()  # who may write to this node's memory for it

    def forget(self, sender: NodeId) -> None:
        """This sender writes nothing any more."""
        self.granted = {block: node for block, node in self.granted.items() if node != sender}


class Multicasts:
    """One thread's: ``do`` brings a call there. ``freed()`` is called when memory that was reserved has been given up.

    ``window``: how many of this node's sends may be under way at once, and how many of its receives. ``collective`` takes
    broadcasts over; it tells of its progress by ``written`` and ``broadcast_ended``, as a peer would.
    """

    def __init__(
        self,
        store: BlockStore,
        endpoint: Endpoint,
        reports: Reports,
        do: Callable[[Callable[[], None]], None],
        *,
        window: int,
        collective: Callable[[StartMulticast, StoreTier], None],
        freed: Callable[[], None],
    ) -> None:
        self._node = reports.node
        self._store = store
        self._endpoint = endpoint
        self._reports = reports
        self._do = do
        self._window = window
        self._collective = collective
        self._freed = freed
        self._outgoing: dict[int, _Outgoing] = {}
        self._incoming: dict[int, _Incoming] = {}
        self._ready: dict[int, dict[NodeId, dict[int, int | None]]] = {}
        self._ended: set[int] = set()

    def cancel(self, number: int) -> None:
        """Stop a multicast."""
        out = self._outgoing.get(number)
        if out is not None:
            out.cancelled = True
            out.sends.clear()
            if not out.in_flight:
                self._end_outgoing(number, out)
        incoming = self._incoming.get(number)
        if incoming is not None:
            incoming.cancelled = True
            self._settle(number, incoming)

    def lost(self, peer: NodeId) -> None:
        """A peer is gone; the controller will say what follows."""
        for number, incoming in list(self._incoming.items()):
            incoming.forget(peer)
            incoming.turns = deque(t for t in incoming.turns if t.src != peer)
            self._take_turns(number, incoming)
            self._settle(number, incoming)
        for told in self._ready.values():
            told.pop(peer, None)
        for number, out in list(self._outgoing.items()):
            # Nothing can be sent to the dead: do not let it hold up what others wait for.
            out.sends = deque(t for t in out.sends if t.dst != peer)
            self._pump(number)

    # -- sending -----------------------------------------------------------------------------------------------------

    def start(self, command: StartMulticast) -> None:
        """Take part in a multicast."""
        plan, number = command.plan, command.transfer_id
        if command.multicast == "collective":
            self._join_broadcast(command)
            return
        sends = deque(t for transfers in plan.rounds for t in transfers if t.src == self._node)
        if sends:
            if self._store.landing_tier == "host":
                self._store.mirror(command.model)  # endpoints send from host memory
            self._outgoing[number] = _Outgoing(command, self._source_tier(command), sends)
        receives = [t for transfers in plan.rounds for t in transfers if t.dst == self._node]
        if receives:
            self._receive(command, receives)
        self._pump(number)

    def _join_broadcast(self, command: StartMulticast) -> None:
        """This node itself counts as the sender: it is what may still write to the memory."""
        blocks = {t.block for transfers in command.plan.rounds for t in transfers}
        blocks = {block for block in blocks if not self._store.holds(command.model, block, self._source_tier(command))}
        if blocks:
            try:
                self._store.reserve(command.model, sorted(blocks))
            except ValueError as error:
                self._reports.failed("StartMulticast", str(error), command.transfer_id)
                return
            granted = dict.fromkeys(blocks, self._node)
            self._incoming[command.transfer_id] = _Incoming(command, blocks, granted=granted)
        self._collective(command, self._source_tier(command))

    def broadcast_ended(self, number: int, error: str) -> None:
        """A broadcast is over; ``error`` says why before its time."""
        incoming = self._incoming.get(number)
        if incoming is None:
            return
        if error and not incoming.cancelled:
            # If a member died, the controller knows already or will soon; this tells it only what it would wait for in vain.
            incoming.cancelled = True
            self._reports.failed("StartMulticast", error, number)
        incoming.forget(self._node)
        self._settle(number, incoming)

    def _source_tier(self, command: StartMulticast) -> StoreTier:
        tiers: dict[NodeId, Tier] = dict(zip(command.plan.sources, command.source_tiers, strict=True))
        # A destination passes on what it has received: blocks stay in the landing tier at least until the multicast ends.
        tier = tiers.get(self._node, self._store.landing_tier)
        return "host" if tier == "host" else "gpu" if self._store.landing_tier == "gpu" else "host"

    def _pump(self, number: int) -> None:
        """Start the next sends, in order, as far as the window, the blocks and the receivers' turns allow."""
        out = self._outgoing.get(number)
        if out is None:
            return
        while out.sends and out.in_flight < self._window:
            transfer, model = out.sends[0], out.command.model
            offsets = self._ready.get(number, {}).get(transfer.dst, {})
            if transfer.block not in offsets:
                return
            offset = offsets[transfer.block]
            if offset is not None and not self._store.holds(model, transfer.block, out.tier):
                return
            out.sends.popleft()
            if offset is not None:  # otherwise it came to the receiver another way
                self._send(number, out, transfer, offset)
        if not out.sends and not out.in_flight:
            self._end_outgoing(number, out)

    def _send(self, number: int, out: _Outgoing, transfer: Send, offset: int) -> None:
        stack = ExitStack()
        (data,) = stack.enter_context(self._store.using(out.command.model, [transfer.block], out.tier))
        out.in_flight += 1

        def sent(future: Future[None]) -> None:
            stack.close()
            self._do(lambda: self._sent(number, out))

        immediate = number << BLOCK_BITS | transfer.block
        try:
            self._endpoint.write(transfer.dst, _memory(data), offset, immediate).add_done_callback(sent)
        except TransportError:
            # The receiver is gone: the controller will re-plan, and what is still to be sent to others goes on.
            stack.close()
            out.in_flight -= 1

    def _sent(self, number: int, out: _Outgoing) -> None:
        out.in_flight -= 1
        self._pump(number)

    def _end_outgoing(self, number: int, out: _Outgoing) -> None:
        del self._outgoing[number]
        self._ended.add(number)
        told = self._ready.pop(number, {})
        if out.cancelled:
            for receiver in told:
                self._fence(receiver, number)

    def _fence(self, receiver: NodeId, number: int) -> None:
        """Tell a receiver that this node writes no more in a multicast."""
        with suppress(TransportError):  # it is gone itself
            self._endpoint.write(receiver, memoryview(b""), 0, number << BLOCK_BITS | _FENCE)

    def note_ready(self, peer: NodeId, message: Ready) -> None:
        """A receiver says where it wants a block."""
        number = message.transfer_id
        if number in self._ended:  # cancelled here, and not yet there
            self._fence(peer, number)
            return
        self._ready.setdefault(number, {}).setdefault(peer, {})[message.block] = message.offset
        self._pump(number)

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _receive(self, command: StartMulticast, receives: list[Send]) -> None:
        model = command.model
        blocks = [t.block for t in receives if not self._store.holds(model, t.block, self._store.landing_tier)]
        try:
            offsets = self._store.reserve(model, blocks)
        except ValueError as error:
            self._reports.failed("StartMulticast", str(error), command.transfer_id)
            return
        senders = tuple(dict.fromkeys(t.src for t in receives))
        incoming = _Incoming(command, set(blocks), offsets, deque(receives), admitted=senders)
        self._incoming[command.transfer_id] = incoming
        for sender in senders:
            with suppress(TransportError):  # as below
                self._endpoint.admit(sender)
        self._take_turns(command.transfer_id, incoming)

    def _take_turns(self, number: int, incoming: _Incoming) -> None:
        """Let the next senders write, in the plan's order, as far as the window allows."""
        while incoming.turns and not incoming.cancelled and len(incoming.granted) < self._window:
            transfer = incoming.turns.popleft()
            wanted = transfer.block in incoming.missing
            message = Ready(number, transfer.block, incoming.offsets[transfer.block] if wanted else None)
            with suppress(TransportError):  # the controller hears of the loss and re-plans
                self._endpoint.send(transfer.src, encode(message))
                if wanted:
                    incoming.granted[transfer.block] = transfer.src

    def written(self, peer: NodeId, immediate: int, xxh3_64: int | None) -> None:
        """A peer's write is complete; the hash of its bytes, where the transport has it already."""
        number, block = immediate >> BLOCK_BITS, immediate & _FENCE
        incoming = self._incoming.get(number)
        if incoming is None:
            return
        if block == _FENCE:
            incoming.forget(peer)
            self._settle(number, incoming)
            return
        incoming.granted.pop(block, None)
        self._take_turns(number, incoming)
        self._arrived(number, incoming, block, xxh3_64)
        self._settle(number, incoming)

    def _arrived(self, number: int, incoming: _Incoming, block: int, xxh3_64: int | None) -> None:
        """A block's bytes are all there: verify, tell, pass on."""
        model = incoming.command.model
        if block in incoming.missing:
            if not self._store.holds(model, block, self._store.landing_tier) and not self._landed(incoming, block, xxh3_64):
                return
            incoming.missing.discard(block)
        for other in list(self._outgoing):
            self._pump(other)
        if not incoming.missing and not incoming.cancelled:
            self._end_incoming(number)

    def _end_incoming(self, number: int) -> None:
        """Nobody writes for it any more."""
        for peer in self._incoming.pop(number).admitted:
            self._endpoint.dismiss(peer)

    def _landed(self, incoming: _Incoming, block: int, xxh3_64: int | None) -> bool:
        number, model = incoming.command.transfer_id, incoming.command.model
        try:
            self._store.land(model, block, xxh3_64)
            if self._store.landing_tier != "gpu":
                self._store.load(model, [block], to="gpu").wait()
        except ValueError as error:
            self._reports.failed("StartMulticast", str(error), number)
            return False
        self._reports.arrived(number, model, block)
        return True

    def _settle(self, number: int, incoming: _Incoming) -> None:
        """Free the memory of a cancelled multicast once nobody writes to it any more."""
        if not incoming.cancelled or incoming.granted:
            return
        self._end_incoming(number)
        model = incoming.command.model
        wanted = {block for other in self._incoming.values() if other.command.model == model for block in other.missing}
        self._store.abandon(model, incoming.missing - wanted)
        self._freed()


def _memory(data: torch.Tensor) -> Memory:
    """A block, as endpoints take it."""
    if data.device.type == "cpu":
        return data.numpy().data
    return DeviceMemory(gpu_of(data.device.index), data.data_ptr(), data.numel())
