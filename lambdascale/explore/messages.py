"""Messages between the simulated nodes and the control plane, as in a live cluster.

What the contract allows, and so what happens here: messages of one node keep their order, also when they are late or come twice;
those of different nodes come in any order. A node's messages from before its loss may come until the loss is told, none
afterwards. Times of events never go back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, cast

from msgspec import structs

from lambdascale.core import NodeId
from lambdascale.core.commands import CancelTransfer, Command, FailRequest, SetTimer
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    ConnectionLost,
    Event,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    TimerFired,
    TokensProduced,
)
from lambdascale.explore.ledger import Ledger
from lambdascale.explore.scenario import Scenario
from lambdascale.sim import SimConfig
from lambdascale.sim.backend import SimBackend

# Seconds by which a timer may be early: sums of floats.
_TOLERANCE = 1e-9


class Message(Event, frozen=True, gc=False):
    """An event on its way from node ``source`` (-1: the controller's own) of a ``generation``."""

    event: Event
    source: NodeId
    generation: int


class Messages(SimBackend):
    """The simulated cluster behind messages and a clock. Subclasses say what faults do to them."""

    def __init__(self, scenario: Scenario) -> None:
        self._ledger = Ledger()
        self._nodes = scenario.cluster.nodes
        super().__init__(
            config=SimConfig(),
            cluster=scenario.cluster,
            models=scenario.models,
            requests=scenario.requests,
            batching=scenario.system.batching,
            seed=scenario.seed,
        )
        self._handlers[FailRequest] = self._ledger.fail
        # What nodes really hold in GPU memory, whatever the control plane has heard: blocks by (node, model).
        self._holds: dict[tuple[NodeId, str], set[int]] = {}
        self._ever: dict[int, tuple[NodeId, ...]] = {}  # all nodes an instance has had, its head first
        self._generation = dict.fromkeys(range(self._nodes), 0)
        self._members = set(range(self._nodes))  # nodes that the controller takes for alive
        self._heard: deque[tuple[Event, bool]] = deque()
        self.repeating = False  # the event just returned was told before
        self._delay_s = dict.fromkeys(range(self._nodes), 0.0)
        self._latest_s = dict.fromkeys(range(self._nodes), 0.0)
        self._paused_until = 0.0
        self._held: list[Message] = []
        self._repeats: deque[float] = deque()
        self._damaged: set[int] = set()
        self._offset_s = 0.0
        self._at = 0.0
        self._timers: dict[int, float] = {}

    def _note(self, entry: Event | Command) -> None:
        """Take note of an event that is told, or of a command."""
        raise NotImplementedError

    def _forget(self, node: NodeId) -> None:
        """Take note that a node is a member no more."""
        raise NotImplementedError

    def _reconnected(self, pair: frozenset[NodeId]) -> bool:
        """Let two nodes have their connection again; False if one of them is lost."""
        raise NotImplementedError

    def _redo_between(self, pair: frozenset[NodeId]) -> None:
        """Redo or report what depended on a connection, as a live controller does."""
        raise NotImplementedError

    # -- Backend -----------------------------------------------------------------------------------------------------

    def submit(self, command: Command) -> None:
        """See Backend."""
        super().submit(command)
        self._note(command)

    def next_event(self) -> Event | None:
        """See Backend."""
        while True:
            while self._heard:
                event, self.repeating = self._heard.popleft()
                told = self._ledger.deliver(event) if isinstance(event, RequestFinished) else event
                if told is not None:
                    told = structs.replace(told, at=self._tick())
                    self._note(told)
                    return told
            found = super().next_event()
            if found is None:
                return None
            if isinstance(found, Message):
                self._hear(found)
            else:
                self._send(found)

    def _tick(self) -> float:
        self._at = max(self._at, self.kernel.now + self._offset_s)
        return self._at

    # -- messages ----------------------------------------------------------------------------------------------------

    def _send(self, event: Event) -> None:
        """Send what happened to the controller: at once, or late; a damaged block becomes a failure."""
        source = self._source(event)
        if isinstance(event, BlockArrived):
            if event.block in self._holds.get((event.node, event.model), ()):
                return  # nodes report a block once, whatever brings it
            if event.transfer_id in self._damaged:
                self._damaged.discard(event.transfer_id)
                reason = f"block {event.block} is damaged"
                event = CommandFailed(event.at, "StartMulticast", reason, transfer_id=event.transfer_id)
            else:
                self._put(event)
        message = Message(event.at, event, source, self._generation.get(source, 0))
        if source < 0:
            self._hear(message)
            return
        due = max(self.kernel.now + self._delay_s[source], self._latest_s[source])
        self._latest_s[source] = due
        self._post(message, due)
        if self._repeats:
            due = self._latest_s[source] = max(due, self.kernel.now + self._repeats.popleft())
            self._post(structs.replace(message, at=-1.0), due)

    def _put(self, event: BlockArrived) -> None:
        self._holds.setdefault((event.node, event.model), set()).add(event.block)

    def _post(self, message: Message, due: float) -> None:
        if due <= self.kernel.now:
            self._hear(message)
        else:
            self.kernel.at(due, cast("Callable[[Any], None]", self._events.append), message)

    def _source(self, event: Event) -> NodeId:
        if isinstance(event, BlockArrived):
            return event.node
        if isinstance(event, TokensProduced | RequestFinished):
            return self._ever[event.instance][0]
        return -1

    def _hear(self, message: Message) -> None:
        """Let the controller take a message, once it runs, unless its sender is not a member any more."""
        if self.kernel.now < self._paused_until:
            self._held.append(message)
            return
        event, source = message.event, message.source
        if source >= 0 and (source not in self._members or self._generation[source] != message.generation):
            return
        told: Event | None = event
        if isinstance(event, RequestArrived):
            self._ledger.begin(event.request.request_id)
        elif isinstance(event, TokensProduced):
            told = self._ledger.tokens(event)
        elif isinstance(event, RequestFinished):
            told = self._ledger.finish(event)
        elif isinstance(event, ConnectionLost) and not self._reconnected(frozenset((event.node, event.peer))):
            told = None
        if told is not None:
            self._heard.append((told, message.at < 0))
        if isinstance(told, ConnectionLost):
            self._redo_between(frozenset((told.node, told.peer)))
        if isinstance(event, NodeLost) or (isinstance(event, NodeJoined) and event.at and event.node in self._members):
            self._forget(event.node)
        if isinstance(event, NodeJoined):
            self._members.add(event.node)

    def _go_on(self, _: object) -> None:
        if self.kernel.now < self._paused_until:
            return
        held, self._held = self._held, []
        for message in held:
            self._hear(message)
        if self._heard:  # next_event looks at what was heard once the kernel returns
            self._events.append(Message(0.0, Event(0.0), self._nodes, 0))

    def _wake(self) -> None:
        """Have ``next_event`` look at what was heard: the kernel returns once it finds an event."""
        self._events.append(Message(0.0, Event(0.0), self._nodes, 0))

    def _cancel(self, command: CancelTransfer) -> None:
        self._damaged.discard(command.transfer_id)
        super()._cancel(command)

    # -- time --------------------------------------------------------------------------------------------------------

    def _set_timer(self, command: SetTimer) -> None:
        self._timers[command.timer_id] = command.at
        self._timer_due(command.timer_id)

    def _timer_due(self, timer_id: int) -> None:
        due = self._timers.get(timer_id)
        if due is None:
            return
        left = due - max(self._at, self.kernel.now + self._offset_s)
        if left <= _TOLERANCE:
            del self._timers[timer_id]
            self._events.append(TimerFired(self.kernel.now, timer_id))
        else:
            self.kernel.at(self.kernel.now + due - (self.kernel.now + self._offset_s), self._timer_due, timer_id)
