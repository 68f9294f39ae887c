"""CUDA IPC, for GPUs of one host: a write is a copy into the peer's GPU memory, announced over the connection (TCP) for the rest.

A node's registered memory is on its GPU, allocated here. Peers open it through a handle when they connect, so blocks bypass the
host's memory, unless they are sent from there.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from lambdascale.core import NodeId
from lambdascale.core.checks import require
from lambdascale.transport.base import Handlers, Memory, TransportError
from lambdascale.transport.cuda import HANDLE_BYTES, Copies, CudaError, DeviceMemory, Gpu, address_of
from lambdascale.transport.leases import Lease, TheirLease, make_file, new_number, open_file
from lambdascale.transport.sockets import fill
from lambdascale.transport.tcp import TcpEndpoint

# Boot id of the host, process, its number, descriptor of its file of leases, number of this end's lease, address, size, handle.
_CARD = struct.Struct(f"!16s20sQQQQQ{HANDLE_BYTES}s")
_PROCESS = struct.Struct("!16sI")
_TOKEN = secrets.token_bytes(16)
_LENGTH = struct.Struct("!H")
_LONGEST = 1000
# Piece of a write, between which messages are sent: a tenth of a millisecond within a GPU, milliseconds over PCIe.
_STEP_BYTES = 64 << 20


class _Opened:
    """The peer's memory in this GPU's address space, written to while ``lease`` is held. See Reachable."""

    step_bytes = _STEP_BYTES

    def __init__(self, gpu: Gpu, address: int, nbytes: int, lease: Lease, theirs: TheirLease, *, foreign: bool) -> None:
        self.nbytes = nbytes
        self._lease, self._theirs = lease, theirs
        self._gpu, self._address, self._foreign = gpu, address, foreign
        self._copies, self._ahead = Copies(gpu), Copies(gpu)

    def put(self, data: Memory, at: int) -> None:
        self._copies.start(self._address + at, address_of(data), data.nbytes)

    def complete(self) -> None:
        # No hash: the bytes were in no CPU cache. The receiver's GPU computes their digest.
        self._copies.wait()

    def place(self, data: Memory, at: int) -> None:
        self._ahead.start(self._address + at, address_of(data), data.nbytes)
        self._ahead.wait()

    def wait_for_peer(self) -> None:
        self._theirs.wait()

    def close(self) -> None:
        with suppress(CudaError):  # a broken context refuses to free anything, and copies nothing any more
            self._copies.wait()
            self._ahead.wait()
            self._copies.close()
            self._ahead.close()
            if self._foreign:
                self._gpu.shut(self._address)
        self._lease.close()


class CudaIpcEndpoint(TcpEndpoint):
    """An Endpoint for processes of one host, each with a GPU or a share of one."""

    on_device = True

    def __init__(self, node: NodeId, handlers: Handlers, key: bytes, *, gpu: Gpu, **options: Any) -> None:
        self.gpu = gpu
        self.host_id = UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
        self.process_id = _PROCESS.pack(_TOKEN, os.getpid())
        self._arena: DeviceMemory | None = None
        self._leases = make_file()
        super().__init__(node, handlers, key, **options)

    def allocate(self, size: int) -> DeviceMemory:
        """See Endpoint. GPU memory; UserError for a second call, CapacityError if the GPU has too little free memory."""
        require(self._arena is None, "an endpoint's GPU memory is allocated once")
        self._arena = self.gpu.allocate(size)
        return self._arena

    def register(self, memory: Memory) -> None:
        """See Endpoint. UserError for memory that did not come from ``allocate``."""
        require(memory is self._arena, "GPU memory must come from the endpoint's allocate()")
        super().register(memory)

    def introduce(self, peer: NodeId, sock: socket.socket) -> _Opened:
        """Exchange handles and open the peer's; TransportError at both ends if either fails to open the other's."""
        mine = new_number()
        sock.sendall(self._card(mine))
        answer = bytearray(_CARD.size)
        fill(sock, memoryview(answer))
        try:
            opened = self._open(peer, mine, *_CARD.unpack(answer))
        except TransportError as error:
            with suppress(OSError, EOFError):
                _compare(sock, str(error))
            raise
        with ExitStack() as undo:
            undo.callback(opened.close)
            problem = _compare(sock, "")
            if problem:
                raise TransportError(problem)
            undo.pop_all()
        return opened

    def _card(self, number: int) -> bytes:
        arena = self._arena
        where = (0, 0, b"") if arena is None else (arena.address, arena.nbytes, self.gpu.share(arena))
        return _CARD.pack(self.host_id, self.process_id, os.getpid(), self._leases, number, *where)

    def _open(
        self, peer: NodeId, mine: int, host: bytes, process: bytes, pid: int, leases: int, number: int, *where: Any
    ) -> _Opened:
        """Open the peer's memory, with a lease on it; TransportError on failure."""
        address, size, handle = where
        if host != self.host_id:
            raise TransportError(f"nodes {self.node} and {peer} are on different hosts: cuda_ipc is for the GPUs of one host")
        # CUDA refuses to open a handle in the process that made it, which can use the address itself.
        foreign = size > 0 and process != self.process_id
        try:
            with ExitStack() as undo:
                lease = Lease(open_file(pid, leases), mine)
                undo.callback(lease.close)
                reached = self.gpu.open(handle) if foreign else address
                opened = _Opened(self.gpu, reached, size, lease, TheirLease(self._leases, number), foreign=foreign)
                undo.pop_all()
                return opened
        except OSError as error:  # also CUDA's
            raise TransportError(
                f"node {self.node} (GPU {self.gpu.ordinal}) cannot open the GPU memory of node {peer}: {error}"
            ) from error

    def close(self) -> None:
        """See Endpoint. Frees the GPU memory, which must not be used afterwards."""
        super().close()
        if self._arena is not None:
            with suppress(CudaError):
                self.gpu.free(self._arena)
            self._arena = None
        if self._leases >= 0:
            os.close(self._leases)
            self._leases = -1


def _compare(sock: socket.socket, problem: str) -> str:
    """Send the peer this end's problem ("" for none); return the peer's."""
    said = problem.encode()[:_LONGEST]
    sock.sendall(_LENGTH.pack(len(said)) + said)
    head = bytearray(_LENGTH.size)
    fill(sock, memoryview(head))
    heard = bytearray(min(_LONGEST, _LENGTH.unpack(head)[0]))
    fill(sock, memoryview(heard))
    return heard.decode(errors="replace")
