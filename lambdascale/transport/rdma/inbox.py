"""What has come from a peer, put together: complete writes, whole messages, credits, the goodbye."""

from __future__ import annotations

from collections.abc import Callable

from lambdascale.transport.rdma import frames
from lambdascale.transport.rdma.frames import Assembly, Frame, Gather, Kind

_LARGEST_MESSAGE = 1 << 30


class Inbox:
    """Tells of writes by ``on_write(immediate, offset, size)``, messages by ``on_message``, credits by ``on_credit(rail, n)``.

    One thread calls it, in the order in which completions come on each rail.
    """

    def __init__(
        self,
        on_write: Callable[[int, int, int], None],
        on_message: Callable[[bytes], None],
        on_credit: Callable[[int, int], None],
    ) -> None:
        self._on_write, self._on_message, self._on_credit = on_write, on_message, on_credit
        self._gather = Gather()
        self._assembly = Assembly(_LARGEST_MESSAGE)
        self._goodbye = -1  # how many writes the peer had given before it

    @property
    def peer_has_left(self) -> bool:
        """It has said goodbye, and everything that it gave before is here."""
        return self._gather.complete == self._goodbye

    def immediate(self, serial: int) -> bool:
        """A rail's last chunk of a write. Whether the peer needed a credit for it."""
        self._tell(self._gather.landed(serial))
        return True

    def frame(self, data: memoryview) -> bool:
        """A send. Whether the peer needed a credit for it. ValueError for what is none of this transport."""
        frame = frames.decode(data)
        if frame.kind is Kind.WRITE:
            self._tell(self._gather.announce(frame))
        elif frame.kind is Kind.MESSAGE:
            message = self._assembly.add(frame.first, data[frames.HEAD_BYTES :])
            if message is not None:
                self._on_message(message)
        elif frame.kind is Kind.CREDIT:
            self._on_credit(frame.number, frame.first)
        else:
            self._goodbye = frame.first
        return frame.kind is not Kind.CREDIT

    def _tell(self, complete: list[Frame]) -> None:
        for frame in complete:
            self._on_write(frame.first, frame.second, frames.size_of(frame))
