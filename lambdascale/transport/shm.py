"""Shared memory of one host: a write is one copy into the peer's memory, told over the TCP connection that all else goes over.

The memory is an unnamed file (memfd) that peers open through /proc: it is gone with the last process that has it, so nothing
can be left behind.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct

from lambdascale.core.checks import require
from lambdascale.transport.sockets import fill
from lambdascale.transport.tcp import TcpEndpoint

_WHERE = struct.Struct("!QQQ")  # process, descriptor, size


class ShmEndpoint(TcpEndpoint):
    """An Endpoint among processes of one user on one host."""

    _descriptor = -1
    _size = 0

    def allocate(self, size: int) -> memoryview:
        """See Endpoint. Once per endpoint."""
        require(self._descriptor < 0, "an endpoint's shared memory is allocated once")
        self._descriptor, self._size = os.memfd_create("lambdascale"), size
        os.ftruncate(self._descriptor, max(1, size))
        return memoryview(mmap.mmap(self._descriptor, max(1, size), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))[:size]

    def register(self, memory: memoryview) -> None:
        """See Endpoint. UserError for memory that ``allocate`` did not give."""
        ours = memory.nbytes == self._size and isinstance(memory.obj, mmap.mmap)
        require(ours, "shared memory must come from the endpoint's allocate()")
        super().register(memory)

    def introduce(self, sock: socket.socket) -> memoryview | None:
        """Exchange where the memories are and map the peer's. OSError if it is another user's or on another host."""
        sock.sendall(_WHERE.pack(os.getpid(), max(0, self._descriptor), self._size))
        answer = bytearray(_WHERE.size)
        fill(sock, memoryview(answer))
        process, descriptor, size = _WHERE.unpack(answer)
        if size == 0:
            return memoryview(b"")
        opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
        try:
            # Populated now: a page fault for every 4 KiB would cost more than the copy.
            return memoryview(mmap.mmap(opened, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
        finally:
            os.close(opened)

    def close(self) -> None:
        """See Endpoint."""
        super().close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
