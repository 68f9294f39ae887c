"""Assembly of a peer's arrivals into complete writes, whole messages, credits and the goodbye."""

from __future__ import annotations

from collections.abc import Callable

from lambdascale.transport.rdma import frames
from lambdascale.transport.rdma.frames import Assembly, Frame, Gather, Kind
from lambdascale.transport.rdma.gate import unpack_keys

_LARGEST_MESSAGE = 1 << 30


class Inbox:
    """Reports writes by ``on_write(immediate, offset, size)``, messages by ``on_message``, credits by ``on_credit(rail, n)``,
    keys of the peer's memory by ``on_keys``.

    One thread calls it, in the order of each rail's completions.
    """

    def __init__(
        self,
        on_write: Callable[[int, int, int], None],
        on_message: Callable[[bytes], None],
        on_credit: Callable[[int, int], None],
        on_keys: Callable[[list[int]], None],
    ) -> None:
        self._on_write, self._on_message, self._on_credit, self._on_keys = on_write, on_message, on_credit, on_keys
        self._gather = Gather()
        self._assembly = Assembly(_LARGEST_MESSAGE)
        self._goodbye = -1  # number of writes the peer had sent before its goodbye; -1 before that

    @property
    def peer_has_left(self) -> bool:
        """True if the peer has said goodbye and everything it sent before has arrived."""
        return self._gather.complete == self._goodbye

    def immediate(self, serial: int) -> bool:
        """Take a rail's last chunk of a write; return True, since the peer needed a credit for it."""
        self._tell(self._gather.landed(serial))
        return True

    def frame(self, data: memoryview) -> bool:
        """Take a send; return True if the peer needed a credit for it. ValueError if it is not a frame of this transport."""
        frame = frames.decode(data)
        if frame.kind is Kind.WRITE:
            self._tell(self._gather.announce(frame))
        elif frame.kind is Kind.MESSAGE:
            message = self._assembly.add(frame.first, data[frames.HEAD_BYTES :])
            if message is not None:
                self._on_message(message)
        elif frame.kind is Kind.CREDIT:
            self._on_credit(frame.number, frame.first)
        elif frame.kind is Kind.KEYS:
            self._on_keys(unpack_keys(data[frames.HEAD_BYTES :]))
        else:
            self._goodbye = frame.first
        return frame.kind is not Kind.CREDIT

    def _tell(self, complete: list[Frame]) -> None:
        for frame in complete:
            self._on_write(frame.first, frame.second, frames.size_of(frame))
