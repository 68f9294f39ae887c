"""Connections of the HTTP server: how many, and how long each may take to ask and to read.

uvicorn parses and writes; it has no bound on connections that say nothing, say it slowly, or do not read. These are here. All of
it belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import h11
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from lambdascale.live.serving.openai_api import ApiError
from lambdascale.live.serving.options import HEAD_BYTES
from lambdascale.live.serving.reasons import Reason

_LINGER_S = 2.0  # seconds for a refused client to read the reason
_MOST_REFUSED = 128  # refused connections that may read their reason at a time
_PIECE_BYTES = 4096
_REASONS: dict[int, Reason] = {400: "malformed", 431: "head_too_large", 501: "transfer_encoding"}
_MESSAGES = {
    400: "the request is not valid HTTP",
    431: f"the first line and the headers of a request have {HEAD_BYTES} bytes at most here",
    501: "this transfer encoding is not supported",
}


class Refusals(Protocol):
    """Counts refusals: see Tally."""

    def refused(self, status: int, reason: Reason) -> None:
        """Count one."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """See HttpOptions."""

    connections: int
    receive_s: float
    send_s: float


class Connection(H11Protocol):
    """A connection that is given up when a request does not come whole in time, or its answer is not read."""

    def __init__(self, config: Config, state: ServerState, limits: ConnectionLimits, tally: Refusals) -> None:
        super().__init__(config, state, {})
        self._limits = limits
        self._tally = tally
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._heard = False  # some of the next request has come

    # -- beginning and end -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Take the connection; with too many, the idle one that would be given up first makes room, or this one is refused."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections and not self._make_room():
            self._refuse(503, "connections", "the server has too many connections", retry_after_s=1)
            if len(self.connections) > self._limits.connections + _MOST_REFUSED:
                self.transport.abort()  # without time to read the reason
            return
        self._receiving = self._after(self._limits.receive_s, self._too_slow)

    def _make_room(self) -> bool:
        others = [each for each in self.connections if each is not self and _is_idle(each)]
        if not others:
            return False
        oldest = min(others, key=lambda each: each.gives_up_at)
        self._tally.refused(0, "displaced")
        self.connections.discard(oldest)  # it is lost soon; until then it must not be chosen again
        oldest.transport.abort()
        return True

    @property
    def idle(self) -> bool:
        """True while no request is being received whole or answered."""
        return self._ending is None and (self.cycle is None or self.cycle.response_complete)

    @property
    def gives_up_at(self) -> float:
        """The loop's time at which an idle connection is given up."""
        timers = [timer.when() for timer in (self._receiving, self.timeout_keep_alive_task) if timer is not None]
        return min(timers, default=0.0)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        for timer in (self._receiving, self._sending, self._ending):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def _after(self, seconds: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, act)

    # -- receiving ---------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse what has come; what a refused client still sends is dropped.

        The head of a request is parsed piece by piece, since h11's bound on it does not hold for one that comes whole.
        """
        while data and self._ending is None:
            self._heard = True
            size = _PIECE_BYTES if self.conn.their_state is h11.IDLE else len(data)
            super().data_received(data[:size])
            data = data[size:]

    def handle_events(self) -> None:
        """Answer what has come whole; time runs while a request has not."""
        super().handle_events()
        if self._ending is not None:
            return
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            if self._receiving is None:
                self._receiving = self._after(self._limits.receive_s, self._too_slow)
        elif self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None
            self._heard = False

    def _too_slow(self) -> None:
        """End a connection whose request has not come whole in time."""
        self._receiving = None
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and not self._heard:
            self.transport.close()
        else:
            self._refuse(408, "slow_request", f"the request did not come whole within {self._limits.receive_s:g} s")

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; h11's error, which is being handled, knows the status."""
        hint = getattr(sys.exception(), "error_status_hint", 400)
        status = hint if hint in _MESSAGES else 400
        self._refuse(status, _REASONS[status], _MESSAGES[status])

    def _refuse(self, status: int, reason: Reason, message: str, retry_after_s: int | None = None) -> None:
        """Answer with an error unless an answer has begun, and end the connection."""
        self._tally.refused(status, reason)
        begun = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        self._drop_request()
        if begun:
            self.transport.abort()
            return
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = ApiError(status, message, kind, reason=reason, retry_after_s=retry_after_s)
        body = msgspec.json.encode(error.body)
        headers = [*error.headers.items(), ("content-type", "application/json"), ("content-length", str(len(body)))]
        lines = [f"HTTP/1.1 {status} {STATUS_PHRASES[status].decode()}", *(f"{name}: {value}" for name, value in headers)]
        self.transport.write("\r\n".join([*lines, "connection: close", "", ""]).encode() + body)
        # Closed at once with data unread, the kernel would reset the connection, and the client might never see the answer.
        self._ending = self._after(_LINGER_S, self.transport.abort)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _drop_request(self) -> None:
        """Tell the application that its request will not come whole."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    # -- sending -----------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Wait for the client to read, for a bounded time."""
        super().pause_writing()
        if self._sending is None:
            self._sending = self._after(self._limits.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop waiting: the client reads again."""
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def on_response_complete(self) -> None:
        """Wait for the next request or, if closing, for the client to read the rest, for a bounded time."""
        super().on_response_complete()
        if self.transport.is_closing() and self._ending is None:
            self._ending = self._after(self._limits.send_s, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        super().timeout_keep_alive_handler()
        if self._ending is None:
            self._ending = self._after(self._limits.send_s, self.transport.abort)


def _is_idle(connection: Any) -> TypeGuard[Connection]:
    return isinstance(connection, Connection) and connection.idle
