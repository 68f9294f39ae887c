"""Memory that nodes write to directly: a part of this node's, and writes to that of others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import torch

from lambdascale.core import NodeId
from lambdascale.live import wire
from lambdascale.live.node.memory import await_computed, memory_of
from lambdascale.transport import Memory, TransportError

# Sends a message to a node; False if the node is lost.
Tell = Callable[[NodeId, wire.Peer], bool]


class Places(Protocol):
    """The part of an Endpoint that writing to places needs."""

    def place(self, peer: NodeId, data: Memory, offset: int) -> Future[None]:
        """See Endpoint."""
        ...


class Area:
    """A node's memory for what others write to places in it, and the way to theirs. For the compute thread.

    ``memory`` begins at byte ``first`` of what the endpoint has registered. It is empty where nothing can be placed.
    """

    def __init__(self, endpoint: Places, memory: Memory, first: int) -> None:
        self._endpoint, self._memory, self.first = endpoint, memory, first

    @property
    def nbytes(self) -> int:
        """Size of the memory."""
        return self._memory.nbytes

    def part(self, begin: int, size: int) -> Area:
        """Return ``size`` bytes of the area from byte ``begin`` on, as an area."""
        return Area(self._endpoint, self._memory[begin : begin + size], self.first + begin)

    def read(self, landed: wire.Landed) -> Memory:
        """Return what has been written here, in place."""
        begin = landed.offset - self.first
        return self._memory[begin : begin + landed.size]

    def write(self, peer: NodeId, data: bytes | torch.Tensor, offset: int) -> wire.Landed | None:
        """Write to byte ``offset`` of a peer's registered memory, ahead of the next message to it. None if the peer is lost.

        Wait until a GPU has computed the data, which is copied in another stream.
        """
        source = self._source(data)
        try:
            done = self._endpoint.place(peer, source, offset)
        except TransportError:
            return None
        done.add_done_callback(lambda _, kept=data: None)  # type: ignore[misc]  # mypy cannot infer the default; the memory lives until read
        return wire.Landed(offset, source.nbytes)

    def _source(self, data: bytes | torch.Tensor) -> Memory:
        """Return data in memory that the endpoint writes from: a GPU's only where peers write to a GPU's."""
        if isinstance(data, bytes):
            return memoryview(data)
        if isinstance(self._memory, memoryview):
            return memory_of(data.cpu())
        await_computed(data)
        return memory_of(data)
