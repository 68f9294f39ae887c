"""Admission: which requests wait, in what order they reach the cluster, and which are refused.

The cluster holds a *window* of requests at a time: as many as it can run on all its nodes, and one batch more. The others wait
here, a queue for each client. Clients take turns: whenever a place in the window comes free, the next client's oldest request
gets it. So a request waits behind at most a window of others, and behind one of every other client for each of its own client's
before it.

All of it belongs to the event loop of the server.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Full = Literal["queue_requests", "queue_tokens", "client_share"]
_RECENT = 256  # ends of requests that the pace is taken over
_RECENT_S = 60.0
_UNKNOWN_S = 10  # Retry-After before any request has ended
_LONGEST_S = 600


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds on what waits: ``requests`` and ``tokens``, of all clients together; a client may have ``share`` of either."""

    window: int
    requests: int
    tokens: int
    share: float


class Refused(Exception):
    """The queue has no room for a request; room is expected after ``retry_after_s``."""

    def __init__(self, reason: Full, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class Place:
    """A request's place: in the queue, then in the window. ``start`` is called once, when it enters the window."""

    client: str
    tokens: int
    start: Callable[[], None]
    state: Literal["waiting", "started", "left"] = "waiting"


@dataclass
class _Line:
    """The waiting requests of a client, and their tokens."""

    places: deque[Place] = field(default_factory=deque)
    tokens: int = 0


class Admission:
    """``clock`` gives seconds and never goes back."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self.bounds = bounds
        self._clock = clock
        self._lines: dict[str, _Line] = {}  # clients that wait; the first one's turn is next
        self._started = 0
        self._ends: deque[float] = deque(maxlen=_RECENT)
        self.waiting = 0
        self.waiting_tokens = 0

    def check(self, client: str, requests: int, tokens: int = 0) -> None:
        """Raise Refused if so many requests of a client may not enter.

        Those that find the queue, or the client's part of it, empty are not refused for their size alone.
        """
        if self._started + self.waiting + requests <= self.bounds.window:
            return
        line = self._lines.get(client, _Line())
        for kind, had, new, bound in (
            ("requests", self.waiting, requests, self.bounds.requests),
            ("tokens", self.waiting_tokens, tokens, self.bounds.tokens),
        ):
            if had and had + new > bound:
                message = f"the server is busy: {had} {kind} wait, {bound} may"
                raise Refused("queue_requests" if kind == "requests" else "queue_tokens", message, self._estimate(self.waiting))
        for kind, had, new, bound in (
            ("requests", len(line.places), requests, self.bounds.requests),
            ("tokens", line.tokens, tokens, self.bounds.tokens),
        ):
            if had and had + new > self.bounds.share * bound:
                message = f"the server is busy: {had} {kind} of this client wait, {int(self.bounds.share * bound)} may"
                raise Refused("client_share", message, self._estimate(len(line.places) * len(self._lines)))

    def enter(self, client: str, wanted: Sequence[tuple[int, Callable[[], None]]]) -> list[Place]:
        """Take the prompts of a body, all or none: tokens and ``start`` of each. Raise Refused without room.

        Some may be started before this returns.
        """
        self.check(client, len(wanted), sum(tokens for tokens, _ in wanted))
        places = [Place(client, tokens, start) for tokens, start in wanted]
        line = self._lines.setdefault(client, _Line())
        line.places.extend(places)
        self._count(line, len(places), sum(place.tokens for place in places))
        self._fill()
        return places

    def leave(self, place: Place) -> None:
        """Give a place up: the request has ended, or its client has left. A second call does nothing."""
        state, place.state = place.state, "left"
        if state == "waiting":
            line = self._lines[place.client]
            line.places.remove(place)
            self._count(line, -1, -place.tokens)
            if not line.places:
                del self._lines[place.client]
        elif state == "started":
            self._started -= 1
            self._ends.append(self._clock())
            self._fill()

    @property
    def started(self) -> int:
        """Number of requests in the window."""
        return self._started

    def _count(self, line: _Line, requests: int, tokens: int) -> None:
        line.tokens += tokens
        self.waiting += requests
        self.waiting_tokens += tokens

    def _fill(self) -> None:
        """Start requests while the window has room, one of each client in turn."""
        while self._lines and self._started < self.bounds.window:
            client = next(iter(self._lines))
            line = self._lines.pop(client)
            place = line.places.popleft()
            self._count(line, -1, -place.tokens)
            if line.places:
                self._lines[client] = line  # behind the others
            place.state = "started"
            self._started += 1
            place.start()

    def _estimate(self, ahead: int) -> int:
        """Seconds until half of ``ahead`` requests have started, at the pace at which requests ended in the last minute."""
        now = self._clock()
        while self._ends and self._ends[0] < now - _RECENT_S:
            self._ends.popleft()
        if not self._ends:
            return _UNKNOWN_S
        pace = len(self._ends) / max(now - self._ends[0], 1.0)
        return min(max(1, math.ceil(ahead / 2 / pace)), _LONGEST_S)
