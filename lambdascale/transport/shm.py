"""Shared memory of one host: a write is one copy into the peer's memory, announced over the TCP connection that carries the rest.

The memory is an unnamed file (memfd) that peers open through /proc. The kernel frees it with the last process that has it open,
so nothing is left behind. Who writes there holds a lease: a connection that has ended counts as lost when its writer has let go.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import xxhash

from lambdascale.core import NodeId
from lambdascale.core.checks import require
from lambdascale.transport.base import Memory
from lambdascale.transport.leases import Lease, TheirLease, make_file, new_number, open_file
from lambdascale.transport.sockets import fill
from lambdascale.transport.tcp import TcpEndpoint

_MADV_POPULATE_WRITE = 23  # linux/mman.h; Python has no name for it
_LIBC = ctypes.CDLL(None, use_errno=True)
# More threads wait for each other in the kernel; smaller pieces are not worth a thread.
_MOST_THREADS = 16
_LEAST_BYTES = 64 << 20
_PAGE_BYTES = 4096
_WHERE = struct.Struct("!QQQQ")  # process, descriptor, size, number of the lease


class _Mapped:
    """The peer's memory, mapped. See Reachable. ``hashes``: hash what is copied; all nodes of a cluster do or none does.

    Hashing brings a piece into a cache, from where it is copied past the caches (see the launcher in
    lambdascale.live.controller): memory is read once. What is hashed
    is what is copied; that a copy within one host's memory arrives is taken for granted, as everywhere.
    """

    step_bytes = 1 << 20

    def __init__(self, memory: memoryview, lease: Lease | None, theirs: TheirLease, *, hashes: bool) -> None:
        self._lease, self._theirs = lease, theirs
        self.nbytes = memory.nbytes
        self._memory = np.frombuffer(memory, dtype=np.uint8)
        self._copied = xxhash.xxh3_64() if hashes else None

    def put(self, data: Memory, at: int) -> None:
        assert isinstance(data, memoryview), "it is on the host"
        if self._copied is not None:
            self._copied.update(data)
        # numpy's copy lets other threads compute meanwhile, a memoryview's does not.
        self._memory[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def place(self, data: Memory, at: int) -> None:
        assert isinstance(data, memoryview), "it is on the host"
        self._memory[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def complete(self) -> int | None:
        if self._copied is None:
            return None
        found = self._copied.intdigest()
        self._copied.reset()
        return found

    def close(self) -> None:
        """Give up the lease; the memory is unmapped with the last reference."""
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def wait_for_peer(self) -> None:
        self._theirs.wait()


class ShmEndpoint(TcpEndpoint):
    """An Endpoint for processes of one user on one host."""

    _descriptor = -1
    _size = 0

    def allocate(self, size: int) -> memoryview:
        """See Endpoint. UserError for a second call."""
        require(self._descriptor < 0, "an endpoint's shared memory is allocated once")
        self._descriptor, self._size = make_file(), size
        os.ftruncate(self._descriptor, max(1, size))
        return memoryview(_mapped(self._descriptor, max(1, size)))[:size]

    def register(self, memory: Memory) -> None:
        """See Endpoint. UserError for memory that did not come from ``allocate``."""
        ours = memory.nbytes == self._size and isinstance(memory, memoryview) and isinstance(memory.obj, mmap.mmap)
        require(ours, "shared memory must come from the endpoint's allocate()")
        super().register(memory)

    def introduce(self, peer: NodeId, sock: socket.socket) -> _Mapped:
        """Exchange the locations of the memories and map the peer's; OSError if it is another user's or on another host."""
        mine = new_number()
        sock.sendall(_WHERE.pack(os.getpid(), max(0, self._descriptor), self._size, mine))
        answer = bytearray(_WHERE.size)
        fill(sock, memoryview(answer))
        process, descriptor, size, number = _WHERE.unpack(answer)
        theirs = TheirLease(self._descriptor, number)
        if size == 0:
            return _Mapped(memoryview(b""), None, theirs, hashes=False)
        with ExitStack() as undo:
            lease = Lease(open_file(process, descriptor), mine)
            undo.callback(lease.close)
            if os.fstat(lease.descriptor).st_size < size:
                raise OSError(f"the memory of node {peer} has fewer than {size} bytes")
            memory, hashes = memoryview(_mapped(lease.descriptor, size)), self.handlers.on_checked is not None
            undo.pop_all()
            return _Mapped(memory, lease, theirs, hashes=hashes)

    def close(self) -> None:
        """See Endpoint."""
        super().close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """Map the file with its pages populated for writing: a page fault for every 4 KiB would cost more than the copy.

    MAP_POPULATE populates the pages of shared memory for reading only. The processor then marks each as written in the page table
    at the first write to it, which in a virtual machine halves that copy's rate (7 GiB by 7 processes: 0.74 s, then 0.33).
    """
    memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED)
    if not populate(memory):
        memory.close()
        return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return memory


def populate(memory: mmap.mmap) -> bool:
    """Enter all pages of a mapping for writing, by several threads; False if the kernel cannot (before Linux 5.14).

    Zeroing the pages is what takes time: one thread does 2.6 GB/s of it. OSError for lack of memory.
    """
    begin = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    step = max(_LEAST_BYTES, -(-len(memory) // _threads() // _PAGE_BYTES) * _PAGE_BYTES)
    pieces = [(begin + at, min(step, len(memory) - at)) for at in range(0, len(memory), step)]
    with ThreadPoolExecutor(len(pieces), "populate") as pool:
        errors = set(pool.map(lambda piece: _advise(*piece), pieces)) - {0}
    if errors - {errno.EINVAL}:
        raise OSError(max(errors), f"{len(memory)} bytes of memory: {os.strerror(max(errors))}")
    return not errors


def _threads() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def _advise(address: int, size: int) -> int:
    """The error number of madvise, 0 for none. Python's own would keep the other threads from running."""
    failed = _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_WRITE)
    return ctypes.get_errno() if failed else 0
