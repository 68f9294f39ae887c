"""A connection to one peer: its queue pairs (a rail for each device) and its socket.

One thread sends; the endpoint's watch thread polls completions and notifies the node of arrivals. The socket over which the two
ends introduced themselves stays open: a process that dies closes it long before retries are exhausted.
"""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Protocol

from lambdascale.core import NodeId
from lambdascale.transport.base import Handlers, Memory, TransportError
from lambdascale.transport.cuda import address_of
from lambdascale.transport.pacing import TokenBucket, take
from lambdascale.transport.rdma.device import Region
from lambdascale.transport.rdma.frames import Card
from lambdascale.transport.rdma.gate import Gate
from lambdascale.transport.rdma.inbox import Inbox
from lambdascale.transport.rdma.lane import Arrival, Lane, LaneError
from lambdascale.transport.rdma.outbox import Outbox, Source, Step
from lambdascale.transport.rdma.slots import Slots
from lambdascale.transport.rdma.watch import Watch, guarded
from lambdascale.transport.sockets import TIMEOUT_S, fill, flat

# Time that writes and messages may take to arrive when a connection is ended on purpose.
_DRAIN_S = 60.0
_GRACE_S = 0.5
# Seconds after which a missing completion counts as lost: longer than retries take, or the full queue of an emulated NIC.
_LOST_S = 30.0
_GO = b"!"


class Owner(Protocol):
    """The endpoint a connection belongs to: its handlers, its watching thread and its pacing, and who hears of the end."""

    handlers: Handlers
    watch: Watch
    link: TokenBucket | None

    @property
    def step_bytes(self) -> int:
        """Bytes of one work request at most."""
        ...

    def source(self, address: int, size: int) -> Source:
        """Return the registered memory that holds these bytes."""
        ...

    def forget(self, connection: RdmaConnection, lost: str = "") -> None:
        """Record that a connection accepts nothing any more; ``lost``: the reason to tell the node, "" after a goodbye."""
        ...

    def freed(self, connection: RdmaConnection) -> None:
        """Take note that a connection has let go of its device."""
        ...


class RdmaConnection:
    """See Connection."""

    def __init__(
        self,
        endpoint: Owner,
        peer: NodeId,
        sock: socket.socket,
        lanes: list[Lane],
        slots: Slots,
        theirs: Card,
        region: Region | None,
    ) -> None:
        self.peer = peer
        self.sock = sock
        self.lanes = lanes
        self._endpoint = endpoint
        self._slots = slots
        # Guards the outbox, the gate, the lanes' requests and the fields below: callers, sender and watch thread use them.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._outbox = Outbox(lanes, slots, theirs, endpoint.step_bytes)
        self._gate = Gate(lanes, self._outbox, region, self._lock)
        handlers = endpoint.handlers
        self._inbox = Inbox(partial(handlers.on_write, peer), partial(handlers.on_message, peer), self._credited, self._new_keys)
        self._ending = False  # this end says goodbye once everything is through
        self._reason = ""  # the reason why nothing is accepted any more
        self._tells = False  # the node is to hear of it
        self._left = threading.Event()  # the peer has left
        self._freed = False
        self._thread = threading.Thread(target=self._send_all, name=f"rdma-send-{peer}", daemon=True)

    def start(self) -> None:
        """See Connection. The peer sends nothing before it is told that this end listens."""
        self._endpoint.watch.call(self._watch_lanes, self.failed)
        with suppress(OSError):  # then this end will hear of it, too
            self.sock.sendall(_GO)
        self._thread.start()

    def abandon(self) -> None:
        """See Connection."""
        self._free()

    def write(self, data: Memory, offset: int, immediate: int, ways: Sequence[TokenBucket]) -> Future[None]:
        """See Connection."""
        source = self._endpoint.source(address_of(flat(data)), data.nbytes)
        future = self._give(lambda: self._outbox.write(data, source, offset, immediate, ways))
        if future is None:
            source.release()
        return future or self._refusal()

    def send(self, data: bytes) -> Future[None]:
        """See Connection."""
        return self._give(lambda: self._outbox.message(data)) or self._refusal()

    def place(self, data: Memory, offset: int) -> Future[None]:
        """See Endpoint: not possible here."""
        raise TransportError(f"node {self.peer}: nothing can be placed over rdma")

    def admit(self) -> None:
        """See Endpoint."""
        self._at_the_gate(self._gate.admit)

    def dismiss(self) -> None:
        """See Endpoint."""
        self._at_the_gate(self._gate.dismiss)

    def _at_the_gate(self, act: Callable[[], None]) -> None:
        with self._changed:
            if self._reason:
                return
            try:
                act()
            except LaneError as error:
                raise TransportError(f"node {self.peer}: {error}") from error
            self._changed.notify()

    def _give(self, put: Callable[[], Future[None]]) -> Future[None] | None:
        with self._changed:
            if self._reason or self._ending:
                return None
            self._changed.notify()
            return put()

    def _refusal(self) -> Future[None]:
        refused: Future[None] = Future()
        refused.set_exception(TransportError(f"node {self.peer}: {self._reason or 'disconnected'}"))
        return refused

    # -- sending -----------------------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        try:
            answer = bytearray(1)
            fill(self.sock, memoryview(answer))
            self.sock.setblocking(False)
            self._endpoint.watch.call(self._watch_socket, self.failed)
            while (step := self._next()) is not None:
                self._take(step)
        except (OSError, EOFError, LaneError, TransportError) as error:
            self._break(str(error) or "the connection has ended")
        except Exception as error:  # a fault of ours: nothing is sent any more, and the node has to know
            traceback.print_exc()
            self.failed(error)

    def _next(self) -> Step | None:
        """Wait for the next step and return it; None when the connection has ended."""
        with self._changed:
            while not self._reason:
                step = self._outbox.step()
                if step is not None:
                    return step
                if self._outbox.said_goodbye and all(lane.idle for lane in self.lanes):
                    return None
                self._changed.wait()
        return None

    def _take(self, step: Step) -> None:
        link = self._endpoint.link
        if step.paced_bytes:
            take(step.ways or ([] if link is None else [link]), step.paced_bytes)
        with self._changed:
            if not self._reason:
                step.post()

    # -- on the watch thread -----------------------------------------------------------------------------------------

    def _watch_lanes(self) -> None:
        for rail, lane in enumerate(self.lanes if not self._freed else []):
            self._endpoint.watch.add(lane.fd, partial(self._completed, rail, lane, acknowledge=True), self.failed)

    def _watch_socket(self) -> None:
        if not self._freed:
            self._endpoint.watch.add(self.sock.fileno(), self._socket_readable, self.failed)

    def _completed(self, rail: int, lane: Lane, *, acknowledge: bool) -> None:
        """Poll a rail's completions and act on them."""
        items: list[Arrival | Callable[[], None]] = []
        failure = ""
        with self._changed:
            try:
                if acknowledge:
                    lane.acknowledge()
                lane.completed(items)
            except LaneError as error:
                failure = str(error)
        try:
            for item in items:
                self._arrived(rail, lane, item) if isinstance(item, Arrival) else item()
        except (LaneError, ValueError) as error:
            failure = failure or str(error)
        with self._changed:
            self._changed.notify()
        if self._inbox.peer_has_left:
            self._peer_left()
        elif failure:
            self._break(failure)

    def _arrived(self, rail: int, lane: Lane, arrival: Arrival) -> None:
        if arrival.immediate is not None:
            counts = self._inbox.immediate(arrival.immediate)
        else:
            counts = self._inbox.frame(self._slots.view(arrival.slot, arrival.size))
        lane.receive_again(arrival.slot)
        back = lane.receives.used() if counts else 0
        if back:
            with self._changed:
                self._outbox.credit(rail, back)

    def _credited(self, rail: int, count: int) -> None:
        with self._changed:
            self.lanes[rail].receives.credits += count

    def _new_keys(self, keys: list[int]) -> None:
        with self._changed:
            self._outbox.keys = keys

    def _socket_readable(self) -> None:
        """Note that the peer's process has ended, or that it has closed the connection: it sends nothing else here."""
        for rail, lane in enumerate(self.lanes):
            if not self._freed:
                self._completed(rail, lane, acknowledge=False)
        if self._freed:
            return
        self._endpoint.watch.remove(self.sock.fileno())
        if self._ending:
            self._left.set()
        else:
            self._break("the connection has ended")

    def check(self) -> None:
        """Break the connection if a completion has been lost. Called every second or so."""
        with self._changed:
            stuck_s = max(lane.stuck_s() for lane in self.lanes) if not self._freed else 0.0
        if stuck_s > _LOST_S:
            self._break(f"no completion for {stuck_s:.0f} s")

    # -- ends --------------------------------------------------------------------------------------------------------

    def _peer_left(self) -> None:
        self._left.set()
        if not self._ending:
            self._break("the peer has disconnected", tell=False)

    def finish(self) -> None:
        """See Connection. Must not be called from a handler."""
        with self._changed:
            self._ending = True
            self._outbox.goodbye()
            self._changed.notify()
        deadline = time.monotonic() + _DRAIN_S
        while self._thread.is_alive() and time.monotonic() < deadline and not self._is_shut_out():
            self._thread.join(_GRACE_S)
        if not self._reason:
            self._left.wait(TIMEOUT_S)
        self._break("disconnected", tell=False)
        self._endpoint.watch.call_and_wait(self._free, TIMEOUT_S)
        self._thread.join(TIMEOUT_S)

    def _is_shut_out(self) -> bool:
        with self._changed:
            return self._outbox.is_shut_out

    def failed(self, error: Exception) -> None:
        """Break the connection after an exception that nothing foresaw: the peer counts as lost."""
        self._break(f"{type(error).__name__}: {error}")

    def _break(self, reason: str, *, tell: bool = True) -> None:
        """End the connection: nothing is accepted any more. The watch thread tells the node, once nothing can arrive any more."""
        with self._changed:
            if self._reason:
                return
            self._reason, self._tells = reason, tell and not self._ending
            self._changed.notify()
        self._endpoint.watch.call(self._free)

    def cut(self, reason: str) -> None:
        """See Connection."""
        self._break(reason)
        self._endpoint.watch.call_and_wait(self._free, TIMEOUT_S)

    def _free(self) -> None:
        """Close queue pairs, memory and socket, and tell who waits; on the watch thread, or before the connection was started.

        A queue pair that is closed takes no write any more: the peer's may be under way, and the node uses its memory anew.
        """
        with self._changed:
            if self._freed:
                return
            self._freed = True
            for step in self._closing_steps():
                guarded(step)  # one that fails leaves nothing else open, and nobody waiting
            futures: list[Future[None]] = []
            guarded(lambda: futures.extend(self._outbox.fail()))
        self._endpoint.freed(self)
        for future in futures:
            future.set_exception(TransportError(f"node {self.peer}: {self._reason}"))
        guarded(lambda: self._endpoint.forget(self, self._reason if self._tells else ""))
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # the peer sees this side's end now, and may connect anew
        guarded(self.sock.close)

    def _closing_steps(self) -> Iterator[Callable[[], None]]:
        watch = self._endpoint.watch
        yield self._gate.close  # first: a queue pair waits for the windows bound to it
        for lane in self.lanes:
            yield partial(watch.remove, lane.fd)
            yield lane.close
        yield partial(watch.remove, self.sock.fileno())
        yield self._slots.close
