"""Registered memory in slots, for what goes by sends."""

from __future__ import annotations

import mmap
from collections import deque

from lambdascale.transport.cuda import address_of
from lambdascale.transport.rdma.device import Device, register
from lambdascale.transport.rdma.frames import HEAD_BYTES, Frame

SLOT_BYTES = 32 << 10


class Slots:
    """``receives`` slots that peers send into, then ``sends`` of our own. On the first rail's device: sends go there."""

    piece_bytes = SLOT_BYTES - HEAD_BYTES  # of a message

    def __init__(self, device: Device, receives: int, sends: int) -> None:
        count = receives + sends
        self._map = mmap.mmap(-1, count * SLOT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self._memory = memoryview(self._map)
        self._address = address_of(self._memory)
        # Written by the device, but by nobody's remote writes.
        self._region = register([device], self._address, len(self._memory), local=True)
        self.key = self._region.local_keys[0]
        self.free = deque(range(receives, count))

    def address(self, slot: int) -> int:
        """Where a slot begins."""
        return self._address + slot * SLOT_BYTES

    def view(self, slot: int, size: int) -> memoryview:
        """What is in a slot."""
        return self._memory[slot * SLOT_BYTES : slot * SLOT_BYTES + size]

    def fill(self, slot: int, frame: Frame, piece: memoryview) -> int:
        """Put a frame and a piece of a message into a slot; how long that is."""
        begin = slot * SLOT_BYTES
        self._memory[begin : begin + HEAD_BYTES] = frame.encode()
        self._memory[begin + HEAD_BYTES : begin + HEAD_BYTES + len(piece)] = piece
        return HEAD_BYTES + len(piece)

    def close(self) -> None:
        """Free the memory; no queue pair uses it any more."""
        self._region.close()
        self._memory.release()
        self._map.close()
