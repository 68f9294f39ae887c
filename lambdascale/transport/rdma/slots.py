"""Registered memory divided into slots, for frames and messages, which are sends."""

from __future__ import annotations

import mmap
from collections import deque

from lambdascale.transport.cuda import address_of
from lambdascale.transport.rdma.device import Device, register
from lambdascale.transport.rdma.frames import HEAD_BYTES, Frame

SLOT_BYTES = 32 << 10


class Slots:
    """``receives`` slots that peers send into, then ``sends`` of our own, registered with the first rail, which does sends."""

    piece_bytes = SLOT_BYTES - HEAD_BYTES  # largest piece of a message

    def __init__(self, device: Device, receives: int, sends: int) -> None:
        count = receives + sends
        self._map = mmap.mmap(-1, count * SLOT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self._memory = memoryview(self._map)
        self._address = address_of(self._memory)
        # Written by the device itself, but closed to remote writes.
        self._region = register([device], self._address, len(self._memory), local=True)
        self.key = self._region.local_keys[0]
        self.free = deque(range(receives, count))

    def address(self, slot: int) -> int:
        """Address of a slot."""
        return self._address + slot * SLOT_BYTES

    def view(self, slot: int, size: int) -> memoryview:
        """First ``size`` bytes of a slot."""
        return self._memory[slot * SLOT_BYTES : slot * SLOT_BYTES + size]

    def fill(self, slot: int, frame: Frame, piece: memoryview) -> int:
        """Copy a frame and a piece of a message into a slot; return their total size in bytes."""
        begin = slot * SLOT_BYTES
        self._memory[begin : begin + HEAD_BYTES] = frame.encode()
        self._memory[begin + HEAD_BYTES : begin + HEAD_BYTES + len(piece)] = piece
        return HEAD_BYTES + len(piece)

    def close(self) -> None:
        """Free the memory, after the last queue pair that uses it has been closed."""
        self._region.close()
        self._memory.release()
        self._map.close()
