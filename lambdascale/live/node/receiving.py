"""A node's receives in multicasts and broadcasts: whose turn it is, verification beside the turns, and memory until nobody
writes.

A receiver tells a sender whose turn it is where it wants the block. So no sender's later rounds overtake its earlier ones, and a
paced link carries one block at a time in each direction. A block is verified before it counts and before it is passed on. A
cancelled multicast keeps its memory until every sender whose turn it was has written or has sent a fence (see sending).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from lambdascale.core import NodeId
from lambdascale.core.commands import StartMulticast
from lambdascale.core.plan import Send
from lambdascale.inference.reception import BlockState, Reception
from lambdascale.inference.store import BlockStore
from lambdascale.live.node.jobs import About, Jobs
from lambdascale.live.node.reports import Reports
from lambdascale.live.node.window import Window
from lambdascale.live.wire import Ready, encode
from lambdascale.transport import Endpoint, TransportError


@dataclass
class _Incoming:
    """The blocks of a transfer that this node waits for, in the plan's order, and the senders that may write now."""

    about: About
    reception: Reception
    missing: set[int]  # blocks that are not usable yet
    turns: deque[Send] = field(default_factory=deque)
    granted: dict[int, NodeId] = field(default_factory=dict)  # blocks that are being written, and by whom
    landing: set[int] = field(default_factory=set)  # blocks whose bytes are being verified and brought to the device
    cancelled: bool = False
    admitted: set[NodeId] = field(default_factory=set)  # senders that this node's endpoint lets write for it

    def forget(self, sender: NodeId) -> None:
        """Expect no write of this sender any more."""
        self.granted = {block: node for block, node in self.granted.items() if node != sender}

    def lost(self, sender: NodeId) -> None:
        """Expect nothing of this sender any more. A new connection to it has not been admitted."""
        self.forget(sender)
        self.turns = deque(send for send in self.turns if send.src != sender)
        self.admitted.discard(sender)

    @property
    def is_over(self) -> bool:
        """True when nobody writes for it any more and nothing is left to be brought."""
        busy = self.granted or self.landing
        return not busy and (self.cancelled or not (self.missing or self.turns))


class Receiving:
    """``window``: see Window. For the jobs' thread.

    ``usable()`` is called when a block can be sent on; ``freed(model)`` when a transfer is over, and its memory no longer
    reserved.
    """

    def __init__(
        self,
        store: BlockStore,
        endpoint: Endpoint,
        reports: Reports,
        jobs: Jobs,
        *,
        window: Window,
        usable: Callable[[], None],
        freed: Callable[[str], None],
    ) -> None:
        self._store, self._endpoint, self._reports, self._jobs = store, endpoint, reports, jobs
        self._window = window
        self._usable_now, self._freed = usable, freed
        self._incoming: dict[int, _Incoming] = {}

    def start(self, command: StartMulticast, receives: list[Send]) -> None:
        """Begin a multicast's receives. CapacityError, and nothing begun, without room for the blocks."""
        incoming = self._expect(command, [send.block for send in receives])
        incoming.turns = deque(receives)
        for sender in dict.fromkeys(send.src for send in receives):
            with suppress(TransportError):  # it is lost: the controller plans anew
                self._endpoint.admit(sender)
                incoming.admitted.add(sender)
        self._begin(incoming)

    def join(self, command: StartMulticast, blocks: list[int]) -> None:
        """Begin a broadcast's receives: this node itself counts as the sender, since its own thread writes to the memory."""
        incoming = self._expect(command, blocks)
        incoming.granted = dict.fromkeys(incoming.reception.offsets, self._reports.node)
        self._begin(incoming)

    def _expect(self, command: StartMulticast, blocks: list[int]) -> _Incoming:
        about = About("StartMulticast", command.transfer_id, command.model)
        reception = self._store.expect(command.model, blocks)
        incoming = self._incoming[command.transfer_id] = _Incoming(about, reception, set(blocks))
        return incoming

    def _begin(self, incoming: _Incoming) -> None:
        """Treat resident blocks as if they had arrived, and let the first senders write."""
        for block in incoming.reception.resident:
            self._land(incoming, block, None)
        self._take_turns(incoming)
        self._settle(incoming)

    def _take_turns(self, incoming: _Incoming) -> None:
        """Let the next senders write, in the plan's order for each of them, as far as the window and older writes allow."""
        held_up: set[NodeId] = set()
        for send in () if incoming.cancelled else tuple(incoming.turns):
            if send.src in held_up or not self._may_take(incoming, send):
                if self._window.in_order:
                    break
                held_up.add(send.src)
                continue
            incoming.turns.remove(send)
            offset = incoming.reception.offsets.get(send.block) if send.block in incoming.missing else None
            with suppress(TransportError):  # it is lost: the controller plans anew
                self._endpoint.send(send.src, encode(Ready(incoming.about.transfer_id, send.block, offset)))
                if offset is not None:
                    incoming.granted[send.block] = send.src

    def _may_take(self, incoming: _Incoming, send: Send) -> bool:
        """Return True if the window has room, and nobody may still write to the block for a cancelled transfer.

        What came behind another sender's block, to the same memory, would not be verified.
        """
        if not self._window.has_room(send.src, incoming.granted.values()):
            return False
        return send.block not in incoming.missing or not any(
            other.cancelled and (send.block in other.landing or send.block in other.granted)
            for other in self._incoming.values()
            if other.about.model == incoming.about.model
        )

    def written(self, peer: NodeId, number: int, block: int, xxh3_64: int | None) -> None:
        """Note that a peer's write of a block is complete; ``xxh3_64`` as in Reception. Ignored unless it is the peer's turn."""
        incoming = self._incoming.get(number)
        if incoming is None or incoming.granted.get(block) != peer:
            return
        del incoming.granted[block]
        self._take_turns(incoming)
        if block in incoming.missing:
            self._land(incoming, block, xxh3_64)
        self._settle(incoming)

    def _land(self, incoming: _Incoming, block: int, xxh3_64: int | None) -> None:
        """Make a block usable whose bytes have all arrived: at once if it is on the device, else beside the turns."""
        if incoming.reception.state(block) is BlockState.USABLE:
            self._usable(incoming, block)
            return
        incoming.landing.add(block)
        self._jobs.work(
            incoming.about, partial(incoming.reception.arrived, block, xxh3_64), partial(self._landed, incoming, block)
        )

    def _landed(self, incoming: _Incoming, block: int, error: Exception | None) -> None:
        incoming.landing.discard(block)
        if error is None:
            self._usable(incoming, block)
        else:
            self._reports.failed(incoming.about, error)
        self._settle(incoming)

    def _usable(self, incoming: _Incoming, block: int) -> None:
        """Report a block that is verified and on the device; whatever else was to bring it need not."""
        model = incoming.about.model
        self._reports.arrived(incoming.about.transfer_id, model, block)
        waited = [other for other in self._incoming.values() if other.about.model == model and block in other.missing]
        for other in waited:
            other.missing.discard(block)
        for other in waited:
            self._settle(other)
        self._usable_now()

    def _settle(self, incoming: _Incoming) -> None:
        """End a transfer that is over: its memory is an ordinary block's, or free."""
        number = incoming.about.transfer_id
        if incoming.cancelled:  # others may have waited for its senders
            for other in list(self._incoming.values()):
                if other.about.model == incoming.about.model:
                    self._take_turns(other)
        if self._incoming.get(number) is not incoming or not incoming.is_over:
            return
        del self._incoming[number]
        incoming.reception.close()
        for peer in sorted(incoming.admitted):
            self._endpoint.dismiss(peer)
        self._freed(incoming.about.model)

    # -- ends before their time --------------------------------------------------------------------------------------

    def fenced(self, peer: NodeId, number: int) -> None:
        """Note a peer's fence: it writes no more in a multicast."""
        incoming = self._incoming.get(number)
        if incoming is not None:
            incoming.forget(peer)
            self._settle(incoming)

    def broadcast_ended(self, number: int, error: str) -> None:
        """Note the end of a broadcast; ``error`` says why before its time, "" if it was complete."""
        incoming = self._incoming.get(number)
        if incoming is None:
            return
        if error and not incoming.cancelled:
            # The controller may know of a member's death already; without this it would wait for a broken set-up in vain.
            incoming.cancelled = True
            self._reports.failed(incoming.about, error)
        incoming.forget(self._reports.node)
        self._settle(incoming)

    def cancel(self, number: int) -> None:
        """Stop a transfer's receives; blocks that arrive all the same count."""
        incoming = self._incoming.get(number)
        if incoming is not None:
            incoming.cancelled = True
            self._settle(incoming)

    def cancel_all(self, model: str) -> None:
        """Stop all receives of a model that leaves this node."""
        for incoming in list(self._incoming.values()):
            if incoming.about.model == model:
                incoming.cancelled = True
                self._settle(incoming)

    def is_receiving(self, model: str) -> bool:
        """Return True while memory is kept for a transfer of the model, also a cancelled one."""
        return any(incoming.about.model == model for incoming in self._incoming.values())

    def lost(self, peer: NodeId) -> None:
        """Expect nothing of a lost node any more; the controller will say what follows."""
        for incoming in list(self._incoming.values()):
            incoming.lost(peer)
            self._take_turns(incoming)
            self._settle(incoming)
