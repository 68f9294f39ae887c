"""LiveBackend: node processes behind the control plane's Backend protocol.

It translates commands into messages to the nodes they concern, and messages into events with the controller's time. One thread,
the control thread, runs all of it; other threads leave what they have to say in a queue (see calls).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import msgspec
import numpy as np

from lambdascale.core import Failure, NodeId, Request, TracedRequest, UserError
from lambdascale.core.checks import shown
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
    BlockArrived,
    CommandFailed,
    ConnectionLost,
    Event,
    NodeEvent,
    NodeGivenUp,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    SetUpDone,
    TimerFired,
)
from lambdascale.core.token_gaps import TokenGaps
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.controller.answers import Answers, Sink, TokenTimes
from lambdascale.live.controller.attention import LOOK_S
from lambdascale.live.controller.calls import Abort, Calls, End, Offer
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import Launcher
from lambdascale.live.controller.log import Log
from lambdascale.live.controller.roster import Roster
from lambdascale.live.controller.transfers import Pair, Transfers
from lambdascale.live.node_config import NodeConfig

_LISTEN_S = 0.25
_ENDED = Failure("stopping", "the run was ended")
_STOPPING = Failure("stopping", "the server is stopping")


class LiveBackend:
    """A running cluster, started by ``start()`` and ended by ``close()``.

    ``trace`` is replayed by the clock, which starts when the initial replicas are in place. ``ticket_of`` makes its prompts.
    ``open_ended``: go on without anything to do, until ``end()``; requests may be offered all the time. A lost node's
    process is started again, ``restarts`` times within ten minutes at most.
    ``clock`` gives seconds and never goes back.
    """

    def __init__(
        self,
        *,
        launcher: Launcher,
        hub: Hub,
        trace: Sequence[TracedRequest],
        ticket_of: Callable[[TracedRequest], Ticket],
        silence_s: float,
        restarts: int = 0,
        open_ended: bool = False,
        token_times: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.launcher = launcher
        self._hub = hub
        self._trace = trace
        self._next_request = 0
        self._ticket_of = ticket_of
        self._open_ended = open_ended
        self._ending = False
        self._calls = Calls(hub.wake)
        self._offered: dict[int, Offer] = {}  # in order of arrival; the control plane has not heard of them yet
        self._events: deque[Event] = deque()
        self._timers: list[tuple[float, int]] = []
        self._transfers = Transfers()
        self._log = Log(clock=clock)
        self._roster = Roster(launcher, hub, self._log, silence_s=silence_s, restarts=restarts, clock=clock)
        self._answers = Answers(self._tell, lambda: self._roster.alive, self._events.append)
        self._clock = clock
        self._listened = clock()
        self._joined = 0.0  # when all nodes had joined
        self._started: float | None = None
        self._at = 0.0
        self._token_times: dict[int, TokenTimes] | None = {} if token_times else None  # of a trace's requests
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
            wire.Happened: lambda node, m: self._happened(node, m.event),
            wire.Tokens: lambda node, m: self._answers.tokens(m),
            wire.Aborted: lambda node, m: self._answers.end_aborted(m),
            wire.Resumed: lambda node, m: self._answers.resumed(m),
            wire.Placed: lambda node, m: self._transfers.placed(m.node, m.model),
        }

    # -- from other threads ------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds of the run; 0 until the clock starts."""
        return 0.0 if self._started is None else self._clock() - self._started

    def offer(self, request: Request, ticket: Ticket, sink: Sink) -> None:
        """Take a request from a front end. ``sink`` hears its answer, or the reason for having none."""
        self._calls.put(Offer(request, ticket, sink))

    def abort(self, request_id: int) -> None:
        """End a request whose client has hung up."""
        self._calls.put(Abort(request_id))

    def end(self, failure: Failure = _ENDED) -> None:
        """End the run: ``next_event`` returns None, and requests under way fail with ``failure``."""
        self._calls.put(End(failure))

    # -- start and end -----------------------------------------------------------------------------------------------

    def start(self, configs: Sequence[NodeConfig]) -> None:
        """Launch the nodes and wait until all are connected. RuntimeError or UserError if one does not come up."""
        self._events.extend(NodeJoined(0.0, node) for node in self._roster.start(configs))
        self._joined = self._clock()

    @property
    def start_parts(self) -> dict[str, float]:
        """Seconds of each part of the start: see Roster; ``loaded``: from then until the initial replicas were in place."""
        parts = self._roster.start_parts
        return parts if self._started is None else parts | {"loaded": self._started - self._joined}

    def token_gaps(self) -> TokenGaps | None:
        """Gaps between the tokens of each answered request of the trace, as they came here; None unless they were asked for."""
        if self._token_times is None:
            return None
        return TokenGaps.of({number: np.diff(times.at_s) for number, times in self._token_times.items() if times.finished})

    def fail_all(self, failure: Failure) -> None:
        """Fail all requests, present and future. For the control thread, or after its end."""
        self._calls.close(failure)
        offered, self._offered = self._offered, {}
        for sink in (*self._answers.sinks, *(offer.sink for offer in offered.values())):
            sink.failed(failure)

    def close(self) -> None:
        """End all agents; no process, port or memory stays behind."""
        self.fail_all(_STOPPING)
        self._roster.close()
        self._hub.close()
        self._log.flush(all_of_them=True)

    # -- Backend -----------------------------------------------------------------------------------------------------

    def submit(self, command: Command) -> None:
        """Start carrying a command out."""
        self._handlers[type(command)](command)

    def next_event(self) -> Event | None:
        """Wait for the next event and return it; None when the run has ended."""
        while True:
            self._answer_calls()
            if self._ending:
                return None
            if self._clock() - self._listened > _LISTEN_S:  # also when one event follows another
                self._listen(0.0)
            event = self._ready()
            if event is not None:
                return event
            if not self._open_ended and self._idle():
                return None
            self._listen(self._until_due())

    def _answer_calls(self) -> None:
        """Carry out the calls of other threads."""
        for call in self._calls.take():
            if isinstance(call, Offer):
                self._offered[call.request.request_id] = call
            elif isinstance(call, Abort):
                if self._offered.pop(call.request_id, None) is None:
                    self._answers.abort(call.request_id)
            else:
                self._ending = True
                self.fail_all(call.failure)

    def _ready(self) -> Event | None:
        """Return what has happened or is due, with its time, or None."""
        event = self._take_event()
        if event is not None:
            return msgspec.structs.replace(event, at=self._tick())
        if self._started is None:
            if self._transfers.initial:
                return None
            self._started = self._clock()
        at = self._tick()
        if self._timers and self._timers[0][0] <= at:
            return TimerFired(at, heappop(self._timers)[1])
        if self._next_request < len(self._trace) and self._trace[self._next_request].arrival_s <= at:
            traced = self._trace[self._next_request]
            self._next_request += 1
            return self._arrive(at, traced.request, self._ticket_of(traced), None)
        if self._offered:
            offer = self._offered.pop(next(iter(self._offered)))
            return self._arrive(at, offer.request, offer.ticket, offer.sink)
        return None

    def _take_event(self) -> Event | None:
        """Return the oldest event that the control plane still has to hear of."""
        while self._events:
            event = self._events.popleft()
            told = self._answers.deliver(event) if isinstance(event, RequestFinished) else event
            if told is not None:
                return told
        return None

    def _arrive(self, at: float, request: Request, ticket: Ticket, sink: Sink | None) -> Event:
        if sink is None and self._token_times is not None:
            sink = self._token_times.setdefault(request.request_id, TokenTimes(self.now))
        self._answers.begin(request.request_id, ticket, sink)
        return RequestArrived(at, request)

    def _tick(self) -> float:
        """Return the time; it never goes back."""
        self._at = max(self._at, self.now())
        return self._at

    def _idle(self) -> bool:
        """True if no further event can come by itself."""
        return not (
            self._events
            or self._timers
            or self._transfers
            or self._transfers.initial
            or self._answers.outstanding
            or self._next_request < len(self._trace)
            or (self._roster.returning and len(self._answers))
        )

    def _until_due(self) -> float:
        """Seconds to wait for messages."""
        longest = min(LOOK_S, self._roster.wait_s())
        if self._started is None:
            return longest
        due = self._timers[0][0] if self._timers else self._at + LOOK_S
        if self._next_request < len(self._trace):
            due = min(due, self._trace[self._next_request].arrival_s)
        return max(0.0, min(due - self.now(), longest))

    def _listen(self, timeout_s: float) -> None:
        messages, ended = self._hub.poll(timeout_s)
        self._listened = self._clock()
        for node, message in messages:
            if self._roster.hear(node, message):
                self._listeners[type(message)](node, message)
        changes = self._roster.look(ended=bool(ended))
        for node, returns in changes.lost.items():
            self._lose(node, returns)
        for node, peer in map(sorted, changes.mended):
            self._events.append(ConnectionLost(0.0, node, peer))
            self._answers.connection_lost(node, peer)
        self._events.extend(NodeGivenUp(0.0, node) for node in changes.given_up)
        self._events.extend(NodeJoined(0.0, node) for node in changes.joined)
        self._log.flush()

    def _lose(self, node: NodeId, returns: bool) -> None:
        """Take note that a node is a member no more, and that what was on it is lost; ``returns``: it will be started again."""
        self._transfers.node_lost(node)
        self._events.append(NodeLost(0.0, node, returns))
        self._answers.node_lost(node)

    # -- messages of agents ------------------------------------------------------------------------------------------

    def _happened(self, node: NodeId, event: NodeEvent) -> None:
        if isinstance(event, CommandFailed):
            self._failed(node, event)
            return
        if isinstance(event, SetUpDone):
            # Of a transfer that has ended meanwhile, or of another node's: nothing waits for it.
            if self._transfers.awaits(event.transfer_id, node) and event.node == node:
                self._events.append(event)
            return
        if event.node != node or not self._transfers.was_asked(node, event.model, event.block):
            self._roster.doom(
                node, f"it reports block {event.block} of {shown(event.model)} at node {event.node}, which was not asked"
            )
            return
        self._transfers.arrived(node, event.model, event.block)
        self._events.append(event)

    def _failed(self, node: NodeId, event: CommandFailed) -> None:
        """Pass a failure on. One that names neither a transfer nor an instance costs its node: nobody could mend it."""
        if self._transfers.initial:
            raise UserError(f"the cluster could not be set up: {event.reason}")
        self._log.say(f"{event.command} failed: {event.reason}")
        if event.transfer_id < 0 and event.instance < 0:
            self._roster.doom(node, f"{event.command} failed: {event.reason}")
            return
        self._transfers.end(event.transfer_id)
        self._answers.instance_failed(event.instance)
        self._events.append(event)

    # -- commands ----------------------------------------------------------------------------------------------------

    def _nothing(self, command: Command) -> None:
        """Do nothing: the command is bookkeeping of the control plane."""

    def _tell(self, node: NodeId, message: wire.ToAgent) -> None:
        if node in self._roster.alive:
            self._hub.send(node, message)

    def _tell_node(self, command: ReleaseNode | EvictBlocks) -> None:
        self._tell(command.node, wire.Do(command))

    def _place_copy(self, command: PlaceCopy) -> None:
        self._transfers.place_copy(command)
        self._tell(command.node, wire.Do(command))

    def _multicast(self, command: StartMulticast) -> None:
        self._transfers.multicast(command, self._roster.alive, self._told(command.model))
        for node in command.plan.members:
            self._tell(node, wire.Do(command))

    def _load(self, command: LoadBlocks) -> None:
        initial = command.tier == "instant" and self._started is None
        self._transfers.load(command, self._roster.alive, self._told(command.model), initial=initial)
        self._tell(command.node, wire.Do(command))

    def _told(self, model: str) -> set[Pair]:
        """Return the blocks whose arrival the control plane has yet to hear of; nodes do not report them again."""
        return {(e.node, e.block) for e in self._events if isinstance(e, BlockArrived) and e.model == model}

    def _cancel(self, command: CancelTransfer) -> None:
        """Tell every node: the members of a transfer are not recorded here, and other nodes ignore the id."""
        self._transfers.end(command.transfer_id)
        for node in sorted(self._roster.alive):
            self._tell(node, wire.Do(command))

    def _set_timer(self, command: SetTimer) -> None:
        heappush(self._timers, (command.at, command.timer_id))
