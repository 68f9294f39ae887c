"""Frames of the RDMA transport, and the bookkeeping of both ends; no verbs, no threads.

An immediate of RDMA has 32 bits, this package's has 64. So a write is announced by a small frame with its number, place, size
and number of rails; the last chunk on every rail carries the announcement's serial number as its immediate. Frames, and pieces
of messages, are sends into receives that the peer has posted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from msgspec import Struct

_HEAD = struct.Struct("!BxxxIQQQ")
HEAD_BYTES = _HEAD.size
SERIALS = 1 << 32


class Kind(IntEnum):
    """Kinds of frames."""

    WRITE = 1  # serial, rails, immediate, offset | size in the tail
    MESSAGE = 2  # a piece of a message; first: size of the whole message
    CREDIT = 3  # receives posted again
    BYE = 4
    KEYS = 5  # keys of the memory, after the head; without keys, earlier ones are void


class RailCard(Struct, frozen=True):
    """Description of a queue pair for the other end. ``key`` of the memory; 0 if a later KEYS frame grants it for a while."""

    qp: int
    psn: int
    lid: int
    gid: bytes
    mtu: int
    infiniband: bool
    key: int


class Card(Struct, frozen=True):
    """A node's end of a connection: ``address`` and ``size`` (bytes) of its memory, number of ``receives`` posted per rail."""

    address: int
    size: int
    receives: int
    rails: tuple[RailCard, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """Head of a send. The meaning of the fields depends on the kind."""

    kind: Kind
    number: int = 0
    first: int = 0
    second: int = 0
    third: int = 0

    def encode(self) -> bytes:
        """Encode to HEAD_BYTES bytes."""
        return _HEAD.pack(self.kind, self.number, self.first, self.second, self.third)


def decode(data: memoryview) -> Frame:
    """Decode a frame from bytes; ValueError if they are not a frame."""
    if len(data) < HEAD_BYTES:
        raise ValueError(f"a frame of {len(data)} bytes")
    kind, number, first, second, third = _HEAD.unpack_from(data)
    return Frame(Kind(kind), number, first, second, third)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a write, in bytes. ``last`` is true for the last piece on its rail."""

    rail: int
    begin: int
    size: int
    last: bool


def chunks(size: int, step: int, rails: int) -> Iterator[Chunk]:
    """Divide a write of ``size`` bytes into pieces of ``step``, assigned to the rails in turn; one empty piece for size 0."""
    count = max(1, -(-size // step))
    used = rails_used(size, step, rails)
    for index in range(count):
        begin = index * step
        yield Chunk(index % used, begin, min(step, size - begin), index + used >= count)


def rails_used(size: int, step: int, rails: int) -> int:
    """Number of rails that ``chunks`` uses."""
    return min(rails, max(1, -(-size // step)))


@dataclass(slots=True)
class _Pending:
    """A write that has not arrived completely."""

    frame: Frame | None = None
    rails: int = 0


class Gather:
    """Assembles writes: complete when announced and when every rail has delivered its last chunk, reported in serial order."""

    def __init__(self) -> None:
        self._pending: dict[int, _Pending] = {}
        self.complete = 0  # number of writes reported

    def announce(self, frame: Frame) -> list[Frame]:
        """Take an announcement; return the announcements of the writes that are complete now."""
        self._at(frame.number).frame = frame
        return self._ready()

    def landed(self, serial: int) -> list[Frame]:
        """Take the arrival of a rail's last chunk; return the announcements of the writes that are complete now."""
        self._at(serial).rails += 1
        return self._ready()

    def _at(self, serial: int) -> _Pending:
        return self._pending.setdefault(serial, _Pending())

    def _ready(self) -> list[Frame]:
        ready = []
        while (first := self._pending.get(self.complete % SERIALS)) and first.frame and first.rails == rails_of(first.frame):
            del self._pending[self.complete % SERIALS]
            self.complete += 1
            ready.append(first.frame)
        return ready


def announcement(serial: int, rails: int, immediate: int, offset: int, size: int) -> Frame:
    """Announcement of a write. Sizes are below 2**56 bytes, so that the number of rails fits beside the size."""
    return Frame(Kind.WRITE, serial, immediate, offset, rails << 56 | size)


def rails_of(frame: Frame) -> int:
    """Number of rails that carry an announced write."""
    return frame.third >> 56


def size_of(frame: Frame) -> int:
    """Size of an announced write in bytes."""
    return frame.third & ((1 << 56) - 1)


class Assembly:
    """Assembles messages of at most ``largest`` bytes from their pieces, which arrive in order."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._size = -1
        self._data = bytearray()

    def add(self, size: int, piece: memoryview) -> bytes | None:
        """Add a piece of a message of ``size`` bytes; return the message once complete, else None. ValueError if too large."""
        if self._size < 0:
            if size > self._largest:
                raise ValueError(f"a message of {size} bytes")
            self._size = size
        self._data += piece
        if len(self._data) < self._size:
            return None
        data, self._data, self._size = bytes(self._data), bytearray(), -1
        return data


class Receives:
    """Receives of a rail as both ends count them, so that nothing is sent without a receive waiting for it.

    ``posted`` counts the receives that need credit; further ones take the frames that need none. A quarter of the credits is
    returned at a time, so that few credit frames are in flight.
    """

    def __init__(self, posted: int) -> None:
        self.posted = posted
        self.credits = posted
        self._used = 0

    def take(self) -> None:
        """Use one credit, before a send that takes one of the peer's receives."""
        assert self.credits > 0, "a send without credit"
        self.credits -= 1

    def used(self) -> int:
        """Count a receive of ours that was used and posted again; return the number of credits to return to the peer now."""
        self._used += 1
        if self._used < max(1, self.posted // 4):
            return 0
        told, self._used = self._used, 0
        return told
