"""A node's sends in one-sided multicasts: in the plan's order for each receiver, each when its block is verified and its receiver
has asked for it.

A one-sided write cannot be called back. A sender whose multicast is cancelled tells every receiver that has asked it for a block
that it writes no more: a fence, an empty write behind all its others.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from lambdascale.core import NodeId
from lambdascale.core.commands import StartMulticast
from lambdascale.core.plan import Send
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockStore
from lambdascale.live.node.jobs import About, Jobs
from lambdascale.live.node.memory import memory_of
from lambdascale.live.node.reports import Reports
from lambdascale.live.node.window import Window
from lambdascale.live.wire import Ready
from lambdascale.transport import Endpoint, TokenBucket, TransportError

BLOCK_BITS = 24
FENCE = (1 << BLOCK_BITS) - 1  # in place of a block's number
_REMEMBERED = 1024


@dataclass
class _Outgoing:
    """The sends of this node in a multicast. ``over``: paces them beside the link."""

    command: StartMulticast
    tier: StoreTier
    sends: deque[Send]
    over: TokenBucket | None
    in_flight: list[NodeId] = field(default_factory=list)  # the receiver of each block under way
    cancelled: bool = False


class Sending:
    """``window``: see Window. For the jobs' thread."""

    def __init__(self, store: BlockStore, endpoint: Endpoint, reports: Reports, jobs: Jobs, *, window: Window) -> None:
        self._store, self._endpoint, self._reports, self._jobs = store, endpoint, reports, jobs
        self._window = window
        self._outgoing: dict[int, _Outgoing] = {}
        self._asked: dict[int, dict[NodeId, dict[int, int | None]]] = {}  # by multicast and receiver: its blocks and their places
        # Multicasts that are over here, the oldest forgotten: a receiver's request crosses the cancellation by one message's
        # time, in which no thousand multicasts end.
        self._ended: OrderedDict[int, None] = OrderedDict()

    def start(self, command: StartMulticast, sends: deque[Send], tier: StoreTier, over: TokenBucket | None = None) -> None:
        """Begin a multicast's sends, from ``tier``. Blocks on a GPU that no endpoint reads are copied to the host first.

        ``over``: see Endpoint.write.
        """
        out = self._outgoing[command.transfer_id] = _Outgoing(command, tier, sends, over)
        if self._store.landing_tier == "host":
            about = About("StartMulticast", command.transfer_id, command.model)
            self._jobs.work(about, partial(self._store.mirror, command.model), partial(self._prepared, about, out))
        self._pump(command.transfer_id)

    def _prepared(self, about: About, out: _Outgoing, error: Exception | None) -> None:
        if error is not None:
            self._reports.failed(about, error)
            self._stop(out)
        self._pump(about.transfer_id)

    def cancel(self, number: int) -> None:
        """Stop a multicast's sends; what is under way is completed. Receivers that ask from now on get a fence."""
        out = self._outgoing.get(number)
        if out is None:
            self._end(number, fence=True)
        else:
            self._stop(out)
            self._pump(number)

    @staticmethod
    def _stop(out: _Outgoing) -> None:
        out.cancelled = True
        out.sends.clear()

    def lost(self, peer: NodeId) -> None:
        """Skip the sends to a lost node: they must not hold up those to others."""
        for told in self._asked.values():
            told.pop(peer, None)
        for out in self._outgoing.values():
            out.sends = deque(send for send in out.sends if send.dst != peer)
        self.pump()

    def ready(self, peer: NodeId, message: Ready) -> None:
        """Note a receiver's request: it is a block's turn at the receiver, which says where it wants the block."""
        number = message.transfer_id
        if number in self._ended:
            self._fence(peer, number)
            return
        self._asked.setdefault(number, {}).setdefault(peer, {})[message.block] = message.offset
        self._pump(number)

    def pump(self) -> None:
        """Go on with all multicasts: more blocks may be ready to be sent."""
        for number in list(self._outgoing):
            self._pump(number)

    def _pump(self, number: int) -> None:
        """Start the next sends, in each receiver's order, as far as the window, the blocks and the receivers' requests allow."""
        out = self._outgoing.get(number)
        if out is None:
            return
        held_up: set[NodeId] = set()
        for send in tuple(out.sends):
            if send.dst in held_up or not self._may_send(number, out, send):
                if self._window.in_order:
                    break
                held_up.add(send.dst)
                continue
            out.sends.remove(send)
            offset = self._asked[number][send.dst].pop(send.block)
            if offset is not None:  # otherwise the receiver has it already, and the send's turn is over
                self._send(number, out, send, offset)
        if not out.sends and not out.in_flight:
            del self._outgoing[number]
            self._end(number, fence=out.cancelled)

    def _may_send(self, number: int, out: _Outgoing, send: Send) -> bool:
        """Return True if the window has room, the receiver has asked for the block and this node has it, verified."""
        asked = self._asked.get(number, {}).get(send.dst, {})
        if send.block not in asked or not self._window.has_room(send.dst, out.in_flight):
            return False
        return asked[send.block] is None or self._store.holds(out.command.model, send.block, out.tier)

    def _send(self, number: int, out: _Outgoing, send: Send, offset: int) -> None:
        stack = ExitStack()
        (data,) = stack.enter_context(self._store.using(out.command.model, [send.block], out.tier))
        out.in_flight.append(send.dst)
        about = About("StartMulticast", number, out.command.model)

        def sent(future: Future[None]) -> None:
            # A failure is the connection's, whose loss is reported by itself.
            stack.close()
            self._jobs.do(about, lambda: self._sent(number, out, send.dst))

        try:
            written = self._endpoint.write(send.dst, memory_of(data), offset, number << BLOCK_BITS | send.block, out.over)
            written.add_done_callback(sent)
        except TransportError:
            # The receiver is lost: the controller plans anew, and the sends to others go on.
            stack.close()
            out.in_flight.remove(send.dst)

    def _sent(self, number: int, out: _Outgoing, receiver: NodeId) -> None:
        out.in_flight.remove(receiver)
        self._pump(number)

    def _end(self, number: int, *, fence: bool) -> None:
        """Forget a multicast. ``fence``: tell those that have asked that this node writes no more."""
        self._ended[number] = None
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        told = self._asked.pop(number, {})
        if fence:
            for receiver in told:
                self._fence(receiver, number)

    def _fence(self, receiver: NodeId, number: int) -> None:
        with suppress(TransportError):  # the receiver is lost
            self._endpoint.write(receiver, memoryview(b""), 0, number << BLOCK_BITS | FENCE)
