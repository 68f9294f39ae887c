"""What the transport says about itself, and the book-keeping of both ends; no verbs, no threads.

An immediate of RDMA has 32 bits, this package's has 64. So a write is announced by a small frame with its number, place and size
and by how many rails it comes; the last chunk on every rail carries the announcement's serial number as its immediate. Frames,
and pieces of messages, are sends into receives that the peer has posted.
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
    """Of frames."""

    WRITE = 1  # serial, rails, immediate, offset | size in the tail
    MESSAGE = 2  # a piece; size: of the whole message
    CREDIT = 3  # receives posted again
    BYE = 4
    KEYS = 5


class RailCard(Struct, frozen=True):
    """One queue pair's end, as told to the other end. ``key``: of the memory; 0 if it is told later, for a while."""

    qp: int
    psn: int
    lid: int
    gid: bytes
    mtu: int
    infiniband: bool
    key: int


class Card(Struct, frozen=True):
    """A node's end of a connection. ``address``, ``size``: of its memory; ``receives``: how many are posted for each rail."""

    address: int
    size: int
    receives: int
    rails: tuple[RailCard, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """Head of a send. What the fields mean is the kind's business."""

    kind: Kind
    number: int = 0
    first: int = 0
    second: int = 0
    third: int = 0

    def encode(self) -> bytes:
        """To bytes."""
        return _HEAD.pack(self.kind, self.number, self.first, self.second, self.third)


def decode(data: memoryview) -> Frame:
    """From bytes; ValueError if it is none."""
    if len(data) < HEAD_BYTES:
        raise ValueError(f"a frame of {len(data)} bytes")
    kind, number, first, second, third = _HEAD.unpack_from(data)
    return Frame(Kind(kind), number, first, second, third)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a write. ``last``: of its rail."""

    rail: int
    begin: int
    size: int
    last: bool


def chunks(size: int, step: int, rails: int) -> Iterator[Chunk]:
    """A write of ``size`` bytes cut into pieces of ``step``, dealt to the rails in turn; one empty piece for nothing."""
    count = max(1, -(-size // step))
    used = rails_used(size, step, rails)
    for index in range(count):
        begin = index * step
        yield Chunk(index % used, begin, min(step, size - begin), index + used >= count)


def rails_used(size: int, step: int, rails: int) -> int:
    """How many rails ``chunks`` uses."""
    return min(rails, max(1, -(-size // step)))


@dataclass(slots=True)
class _Pending:
    """A write of which not everything is there."""

    frame: Frame | None = None
    rails: int = 0


class Gather:
    """Puts writes together: complete when announced and when every rail has brought its last chunk, told in order of serials."""

    def __init__(self) -> None:
        self._pending: dict[int, _Pending] = {}
        self.complete = 0  # how many writes have been told

    def announce(self, frame: Frame) -> list[Frame]:
        """An announcement is here; the announcements of writes that are complete now."""
        self._at(frame.number).frame = frame
        return self._ready()

    def landed(self, serial: int) -> list[Frame]:
        """A rail's last chunk is here."""
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
    """Of a write. Memory and sizes are below 2**56 bytes, so that the number of rails fits beside the size."""
    return Frame(Kind.WRITE, serial, immediate, offset, rails << 56 | size)


def rails_of(frame: Frame) -> int:
    """How many rails bring an announced write."""
    return frame.third >> 56


def size_of(frame: Frame) -> int:
    """Bytes of an announced write."""
    return frame.third & ((1 << 56) - 1)


class Assembly:
    """Puts messages together from their pieces, which come in order."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._size = -1
        self._data = bytearray()

    def add(self, size: int, piece: memoryview) -> bytes | None:
        """A piece of a message of ``size`` bytes; the message once it is whole. ValueError for a message too large."""
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
    """A rail's receives as both ends count them, so that nothing is sent that no receive waits for.

    Of ``posted`` receives, ``spare`` are for frames that need no credit: a quarter of the credits is given back at a time, so
    the peer's credit frames under way are few.
    """

    def __init__(self, posted: int) -> None:
        self.posted = posted
        self.credits = posted
        self._used = 0

    def take(self) -> None:
        """Before a send that the peer's receive takes."""
        assert self.credits > 0, "a send without credit"
        self.credits -= 1

    def used(self) -> int:
        """One of ours was used and is posted again; how many to tell the peer of now."""
        self._used += 1
        if self._used < max(1, self.posted // 4):
            return 0
        told, self._used = self._used, 0
        return told
