"""Calls of other threads to the control thread: one queue, in order, so that the control thread alone touches its tables."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lambdascale.core import Failure, Request
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.controller.answers import Sink


@dataclass(frozen=True, slots=True)
class Offer:
    """A request from a front end."""

    request: Request
    ticket: Ticket
    sink: Sink


@dataclass(frozen=True, slots=True)
class Abort:
    """The client of a request has hung up."""

    request_id: int


@dataclass(frozen=True, slots=True)
class End:
    """The run ends; requests under way fail with ``failure``."""

    failure: Failure


Call = Offer | Abort | End


class Calls:
    """The queue. ``put`` may be called from any thread, the rest from the control thread; ``wake`` tells it of new calls."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        # Guards both below: once the queue is closed, nothing is added that nobody would take. A signal's handler may put a call
        # while its thread puts another: the lock can be taken again.
        self._lock = threading.RLock()
        self._waiting: deque[Call] = deque()
        self._closed: Failure | None = None

    def put(self, call: Call) -> None:
        """Queue a call. An offer that cannot be sent to a node, or comes after ``close``, fails at once."""
        problem = _problem(call.ticket) if isinstance(call, Offer) else None
        with self._lock:
            problem = self._closed or problem
            if problem is None:
                self._waiting.append(call)
        if problem is None:
            self._wake()
        elif isinstance(call, Offer):
            call.sink.failed(problem)

    def take(self) -> list[Call]:
        """Return the calls since the last time, in order."""
        if not self._waiting:
            return []
        with self._lock:
            taken = list(self._waiting)
            self._waiting.clear()
        return taken

    def close(self, failure: Failure) -> None:
        """Take no more calls; offers that nobody has taken fail with ``failure``, as do later ones."""
        with self._lock:
            self._closed = self._closed or failure
        for call in self.take():
            if isinstance(call, Offer):
                call.sink.failed(failure)


def _problem(ticket: Ticket) -> Failure | None:
    """Return the failure of a request that cannot be sent to a node: raised later, it would end the control thread."""
    try:
        wire.encode(ticket)
    except (OverflowError, TypeError, ValueError) as error:
        return Failure("unsendable", f"the request cannot be sent to a node: {error}")
    return None
