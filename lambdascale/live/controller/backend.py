"""LiveBackend: node processes behind the control plane's Backend protocol.

It translates: commands into messages to the nodes they concern, messages into events with the controller's time. And it keeps
what the control plane has no business with: prompts, and the tokens of every answer so far, so that a request that is restarted
goes on where it was and no token reaches a client twice.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import msgspec

from lambdascale.core import NodeId, Request, UserError
from lambdascale.core.commands import (
    AllocateNode,
    CancelTransfer,
    Command,
    Dispatch,
    EvictBlocks,
    FailRequest,
    LoadBlocks,
    PlaceCopy,
    ReleaseNode,
    Repartition,
    Serve,
    SetTimer,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import (
    AnyEvent,
    BlockArrived,
    CommandFailed,
    Event,
    NodeJoined,
    NodeLost,
    RequestArrived,
    TimerFired,
)
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.controller.answers import Answers, Sink
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import Launcher
from lambdascale.live.controller.membership import PING_S, Membership

_START_S = 120.0


class LiveBackend:
    """A running cluster of ``nodes`` nodes, started by ``start()`` and ended by ``close()``.

    ``trace`` is replayed by the clock, which starts when the initial replicas are in place. ``ticket_of`` makes its prompts.
    ``open_ended``: go on when there is nothing to do, until ``end()``; requests may be offered all the time.
    """

    def __init__(
        self,
        *,
        launcher: Launcher,
        hub: Hub,
        nodes: int,
        trace: Sequence[Request],
        ticket_of: Callable[[Request], Ticket],
        silence_s: float,
        open_ended: bool = False,
    ) -> None:
        self.launcher = launcher
        self._hub = hub
        self._nodes = nodes
        self._trace = trace
        self._next_request = 0
        self._ticket_of = ticket_of
        self._open_ended = open_ended
        self._ended = threading.Event()
        self._offered: deque[tuple[Request, Ticket, Sink]] = deque()
        self._aborts: deque[int] = deque()
        self._aborted_early: set[int] = set()
        self._events: deque[Event] = deque()
        self._timers: list[tuple[float, int]] = []
        self._transfers: dict[int, tuple[str, set[tuple[NodeId, int]]]] = {}
        self._members: dict[int, tuple[NodeId, ...]] = {}
        self._holding: set[object] = set()  # what the clock waits for
        self._membership = Membership(launcher, hub, silence_s)
        self._answers = Answers(self._tell, lambda: self._membership.alive, self._events.append)
        self._started: float | None = None
        self._at = 0.0
        self._handlers: dict[type[Command], Callable[[Any], None]] = {
            AllocateNode: self._nothing,
            ReleaseNode: self._tell_node,
            PlaceCopy: self._place_copy,
            EvictBlocks: self._tell_node,
            StartMulticast: self._multicast,
            LoadBlocks: self._load,
            CancelTransfer: self._cancel,
            Serve: self._answers.serve,
            Repartition: self._answers.repartition,
            Dispatch: self._answers.dispatch,
            SwitchMode: self._answers.switch_mode,
            StopInstance: self._answers.stop,
            SetTimer: self._set_timer,
            FailRequest: self._answers.fail,
        }
        self._listeners: dict[type, Callable[[NodeId, Any], None]] = {
            wire.Happened: lambda node, m: self._happened(m.event),
            wire.Tokens: lambda node, m: self._answers.tokens(m),
            wire.Aborted: lambda node, m: self._answers.finish(m.request_id, m.instance),
            wire.Resumed: lambda node, m: self._answers.resumed(m),
            wire.Placed: lambda node, m: self._let_go(("copy", m.node, m.model)),
            wire.Fault: self._fault,
            wire.Severed: self._membership.sever,
            wire.Beat: lambda node, m: None,
        }

    # -- from other threads ------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds of the run; 0 until the clock starts."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def offer(self, request: Request, ticket: Ticket, sink: Sink) -> None:
        """A request from a front end."""
        self._offered.append((request, ticket, sink))
        self._hub.wake()

    def abort(self, request_id: int) -> None:
        """The client of a request is gone."""
        self._aborts.append(request_id)
        self._hub.wake()

    def end(self) -> None:
        """Let ``next_event`` return None, whatever is under way."""
        self._ended.set()
        self._hub.wake()

    def fail_all(self, reason: str) -> None:
        """Tell those who still wait for answers that there will be none."""
        for sink in self._answers.sinks + [sink for _, _, sink in list(self._offered)]:
            sink.failed(reason)

    # -- start and end -----------------------------------------------------------------------------------------------

    def start(self, launch: Callable[[], None]) -> None:
        """Launch the agents and wait until all are connected. RuntimeError or UserError if one does not come up."""
        launch()
        deadline = time.monotonic() + _START_S
        addresses: dict[NodeId, str] = {}
        connected: set[NodeId] = set()
        while len(connected) < self._nodes:
            messages, _ = self._hub.poll(0.1)
            for node, message in messages:
                if isinstance(message, wire.Fault):
                    self._fault(node, message)
                elif isinstance(message, wire.Hello):
                    addresses[node] = message.address
                    if len(addresses) == self._nodes:
                        for other in addresses:
                            self._hub.send(other, wire.Directory(addresses))
                elif isinstance(message, wire.Connected):
                    connected.add(node)
            dead = self.launcher.dead()
            if dead and not messages:
                raise RuntimeError(f"node {dead[0]} ended while it was starting")
            if time.monotonic() > deadline:
                missing = sorted(set(range(self._nodes)) - connected)
                raise RuntimeError(f"nodes {missing} did not come up within {_START_S:.0f} s")
        self._membership.begin(addresses)
        self._events.extend(NodeJoined(0.0, node) for node in sorted(addresses))

    def close(self) -> None:
        """End all agents; no process, port or memory stays behind."""
        self.fail_all("the server is stopping")
        for node in range(self._nodes):
            self._hub.send(node, wire.Shutdown())
        self.launcher.close()
        self._hub.close()

    def _fault(self, node: NodeId, message: wire.Fault) -> None:
        if message.users:
            raise UserError(f"node {node}: {message.reason}")
        raise RuntimeError(f"node {node}: {message.reason}")

    # -- Backend -----------------------------------------------------------------------------------------------------

    def submit(self, command: Command) -> None:
        """Start carrying a command out."""
        self._handlers[type(command)](command)

    def next_event(self) -> Event | None:
        """The next event; waits for it."""
        while not self._ended.is_set():
            event = self._ready()
            if event is not None:
                return event
            if not self._open_ended and self._idle():
                return None
            self._listen(self._until_due())
        return None

    def _ready(self) -> Event | None:
        """What has happened or is due, with its time."""
        if self._events:
            return msgspec.structs.replace(self._events.popleft(), at=self._tick())
        if self._started is None:
            if self._holding:
                return None
            self._started = time.monotonic()
        at = self._tick()
        if self._timers and self._timers[0][0] <= at:
            return TimerFired(at, heappop(self._timers)[1])
        if self._next_request < len(self._trace) and self._trace[self._next_request].arrival_s <= at:
            request = self._trace[self._next_request]
            self._next_request += 1
            return self._arrive(at, request, self._ticket_of(request), None)
        if self._offered:
            return self._arrive(at, *self._offered.popleft())
        return None

    def _arrive(self, at: float, request: Request, ticket: Ticket, sink: Sink | None) -> Event:
        aborted = request.request_id in self._aborted_early
        self._aborted_early.discard(request.request_id)
        self._answers.begin(request.request_id, ticket, sink, aborted=aborted)
        return RequestArrived(at, request)

    def _tick(self) -> float:
        """The time; it never goes back."""
        self._at = max(self._at, self.now())
        return self._at

    def _idle(self) -> bool:
        """Whether nothing can happen any more by itself."""
        return not (
            self._events
            or self._timers
            or self._holding
            or self._answers.outstanding
            or self._transfers
            or self._next_request < len(self._trace)
        )

    def _until_due(self) -> float:
        """How long to wait for messages."""
        due = self._timers[0][0] if self._timers else self._at + PING_S
        if self._next_request < len(self._trace):
            due = min(due, self._trace[self._next_request].arrival_s)
        return max(0.0, min(due - self.now(), PING_S)) if self._started is not None else PING_S

    def _listen(self, timeout_s: float) -> None:
        messages, ended = self._hub.poll(timeout_s)
        for node, message in messages:
            if self._membership.hear(node):
                self._listeners[type(message)](node, message)
        while self._aborts:
            self._abort(self._aborts.popleft())
        for node in self._membership.gone(ended=bool(ended)):
            self._lose(node)

    def _lose(self, node: NodeId) -> None:
        """A node is dead or silent: it is none of the cluster any more, and what was on it is gone."""
        self._membership.remove(node)
        for number, (_, waiting) in list(self._transfers.items()):
            self._arrived(number, {pair for pair in waiting if pair[0] == node})
        self._holding = {held for held in self._holding if not (isinstance(held, tuple) and node in held)}
        self._events.append(NodeLost(0.0, node))
        self._answers.node_lost(node)

    # -- what agents say ---------------------------------------------------------------------------------------------

    def _happened(self, event: AnyEvent) -> None:
        if isinstance(event, BlockArrived):
            # A block may still come under the number of a cancelled transfer when its successor expects it.
            for number, (model, _) in list(self._transfers.items()):
                if model == event.model:
                    self._arrived(number, {(event.node, event.block)})
        elif isinstance(event, CommandFailed):
            print(f"{event.command} failed: {event.reason}", file=sys.stderr)
            self._transfers.pop(event.transfer_id, None)
            self._let_go(("transfer", event.transfer_id))
            if self._holding:
                raise UserError(f"the cluster could not be set up: {event.reason}")
        self._events.append(event)

    def _arrived(self, number: int, pairs: set[tuple[NodeId, int]]) -> None:
        _, waiting = self._transfers[number]
        waiting -= pairs
        if not waiting:
            del self._transfers[number]
            self._let_go(("transfer", number))

    def _let_go(self, held: object) -> None:
        self._holding.discard(held)

    # -- commands ----------------------------------------------------------------------------------------------------

    def _nothing(self, command: Command) -> None:
        """Bookkeeping of the control plane."""

    def _tell(self, node: NodeId, message: wire.ToAgent) -> None:
        if node in self._membership.alive:
            self._hub.send(node, message)

    def _tell_node(self, command: ReleaseNode | EvictBlocks) -> None:
        self._tell(command.node, wire.Do(command))

    def _place_copy(self, command: PlaceCopy) -> None:
        self._holding.add(("copy", command.node, command.model))
        self._tell(command.node, wire.Do(command))

    def _multicast(self, command: StartMulticast) -> None:
        pairs = {(t.dst, t.block) for transfers in command.plan.rounds for t in transfers}
        self._begin(command.transfer_id, command.model, command.plan.members, pairs)
        for node in command.plan.members:
            self._tell(node, wire.Do(command))

    def _load(self, command: LoadBlocks) -> None:
        if command.tier == "instant" and self._started is None:
            self._holding.add(("transfer", command.transfer_id))
        self._begin(command.transfer_id, command.model, (command.node,), {(command.node, block) for block in command.blocks})
        self._tell(command.node, wire.Do(command))

    def _begin(self, number: int, model: str, members: tuple[NodeId, ...], pairs: set[tuple[NodeId, int]]) -> None:
        waiting = {pair for pair in pairs if pair[0] in self._membership.alive}
        if waiting:
            self._transfers[number] = (model, waiting)
        self._members[number] = members

    def _cancel(self, command: CancelTransfer) -> None:
        self._transfers.pop(command.transfer_id, None)
        for node in self._members.pop(command.transfer_id, ()):
            self._tell(node, wire.Do(command))

    def _set_timer(self, command: SetTimer) -> None:
        heappush(self._timers, (command.at, command.timer_id))

    def _abort(self, request_id: int) -> None:
        if any(request.request_id == request_id for request, _, _ in self._offered):
            self._aborted_early.add(request_id)
        else:
            self._answers.abort(request_id)
