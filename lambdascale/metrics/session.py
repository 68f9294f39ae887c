"""The record of a served session: bounded, and of whole requests only."""

from __future__ import annotations

from lambdascale.core import Failure
from lambdascale.core.commands import Command, Dispatch, FailRequest, SetTimer, SwitchMode
from lambdascale.core.events import Event, RequestArrived, RequestFinished, RequestPreempted, TimerFired, TokensProduced
from lambdascale.metrics.recorder import Recorder

# Entries for each request, at most: about twice those that requests have; the rest is for nodes, transfers and instances.
_ENTRIES = 16


class SessionRecorder:
    """Observer that records the first ``most`` requests of a session, and what the cluster did until they had ended.

    It keeps neither timers nor tokens after a request's first, so that its memory does not grow with time or tokens. ``taken``
    counts the requests recorded, ``left_out`` those that came later.
    """

    def __init__(self, most: int) -> None:
        self.recorder = Recorder()
        self.taken = 0
        self.left_out = 0
        self._most = most
        self._entries = _ENTRIES * most
        self._open: set[int] = set()
        self._silent: set[int] = set()  # without a first token

    def on_event(self, event: Event) -> None:
        """See Observer."""
        if isinstance(event, TimerFired) or not self._concerns(event):
            return
        if isinstance(event, RequestArrived):
            self.taken += 1
            self._open.add(event.request.request_id)
            self._silent.add(event.request.request_id)
        elif isinstance(event, TokensProduced):
            self._silent.discard(event.request_id)
        elif isinstance(event, RequestFinished):
            self._open.discard(event.request_id)
        self._entries -= 1
        self.recorder.on_event(event)

    def _concerns(self, event: Event) -> bool:
        if isinstance(event, RequestArrived):
            if full := self._full:
                self.left_out += 1
            return not full
        if isinstance(event, TokensProduced):
            return event.request_id in self._silent
        if isinstance(event, RequestFinished | RequestPreempted):
            return event.request_id in self._open
        return not self._over

    @property
    def _full(self) -> bool:
        return self.taken >= self._most or self._entries <= 0

    @property
    def _over(self) -> bool:
        """True if nothing more belongs to the session."""
        return self._full and not self._open

    def on_command(self, at: float, command: Command) -> None:
        """See Observer."""
        kept: Command | None = command
        if isinstance(command, Dispatch):
            requests = tuple(request for request in command.requests if request.request_id in self._open)
            kept = Dispatch(command.instance, requests) if requests else None
        elif isinstance(command, FailRequest):
            kept = command if command.request_id in self._open else None
            self._open.discard(command.request_id)
        elif isinstance(command, SwitchMode):
            moves = tuple(move for move in command.moves if move[0] in self._open)
            kept = SwitchMode(command.pipeline, moves, command.kv)
        if kept is not None and not isinstance(kept, SetTimer) and not (self._over and not isinstance(kept, FailRequest)):
            self._entries -= 1
            self.recorder.on_command(at, kept)

    def finish(self) -> Recorder:
        """Return the record; requests that have not ended by now fail, since the server was stopped."""
        at = self.recorder.end_s
        for number in sorted(self._open):
            self.recorder.on_command(at, FailRequest(number, Failure("stopping", "the server was stopped")))
        self._open.clear()
        return self.recorder
