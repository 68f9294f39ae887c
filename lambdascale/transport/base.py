"""The interface of a transport: a node's endpoint, and the callbacks through which it notifies its node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from lambdascale.core import NodeId
from lambdascale.transport.cuda import DeviceMemory
from lambdascale.transport.pacing import TokenBucket

# Memory of the host, or of a GPU.
Memory = memoryview | DeviceMemory


class TransportError(RuntimeError):
    """A connection that failed or could not be made; the message names the peer."""


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """Callbacks that an endpoint calls from its own threads; they must return soon and not raise.

    ``on_write(peer, immediate, offset, size)``: a peer's write of ``size`` bytes is complete in registered memory.
    ``on_message(peer, data)``: a message has arrived. ``on_lost(peer, reason)``: the connection is lost without having been
    closed; nothing more arrives over it, and nothing that the peer has begun changes registered memory any more. Writes of one
    peer are reported in the order in which its endpoint was given them, and so are messages; a message does not wait for the
    writes given before it. Transports that hash the bytes while moving them, when they are in a cache, call
    ``on_checked(peer, immediate, offset, size, xxh3_64)`` instead of ``on_write``, which saves
    the verification another pass over the bytes.
    """

    on_write: Callable[[NodeId, int, int, int], None]
    on_message: Callable[[NodeId, bytes], None]
    on_lost: Callable[[NodeId, str], None]
    on_checked: Callable[[NodeId, int, int, int, int], None] | None = None


class Endpoint(Protocol):
    """One node's end of a transport."""

    @property
    def address(self) -> str:
        """Address that a peer needs to connect; it is sent over the control channel."""
        ...

    @property
    def on_device(self) -> bool:
        """True if peers write to a GPU's memory, which ``allocate`` then returns."""
        ...

    def allocate(self, size: int) -> Memory:
        """Allocate ``size`` bytes of memory, all pages touched, that this transport can register."""
        ...

    def register(self, memory: Memory) -> None:
        """Register the memory that peers may write to, before any peer connects. It is neither copied nor resized."""
        ...

    def register_source(self, memory: memoryview) -> None:
        """Register memory that writes are sent from, so that it is prepared once and not for each write."""
        ...

    def expect(self, generations: Mapping[NodeId, int]) -> list[NodeId]:
        """Let in processes of these nodes only, of these generations or later; before the first call, of any node.

        Connections to earlier processes and to other nodes end, and ``on_lost`` has been told of them when this returns. Returns
        the nodes with a lower id than this one's that are not connected: this node has to connect to them.
        """
        ...

    def connect(self, peer: NodeId, address: str) -> None:
        """Connect to a peer with a lower id and return when both ends can use the connection.

        TransportError if the peer cannot be reached, is not the process expected, or refuses.
        """
        ...

    def admit(self, peer: NodeId) -> None:
        """Allow the peer to write to registered memory; TransportError if it is not connected.

        Calls are counted: before the first ``admit``, and after as many ``dismiss``, the peer's writes wait. On a transport that
        cannot refuse writes, the peer may write at any time.
        """
        ...

    def dismiss(self, peer: NodeId) -> None:
        """Undo one ``admit``, after all of the peer's writes have arrived (or it has announced that it writes no more)."""
        ...

    def write(self, peer: NodeId, data: Memory, offset: int, immediate: int, over: TokenBucket | None = None) -> Future[None]:
        """Write ``data`` to byte ``offset`` of the peer's registered memory, then notify it with ``immediate`` (64 bits, >= 0).

        ``data`` is host memory, or GPU memory if ``on_device``. ``over``: paces the write beside the link, as PCIe does what is
        sent from host memory. The call returns at once; the future is done when ``data`` may be changed again, or has a
        TransportError.
        """
        ...

    def send(self, peer: NodeId, data: bytes) -> Future[None]:
        """Send a message, in order with other messages to this peer but ahead of writes in flight.

        The future is done when the message has been sent, or has a TransportError.
        """
        ...

    @property
    def can_place(self) -> bool:
        """True if ``place`` works: where peers may write to registered memory at any time."""
        ...

    def place(self, peer: NodeId, data: Memory, offset: int) -> Future[None]:
        """Write ``data`` to byte ``offset`` of the peer's registered memory, in order with messages and ahead of writes.

        The peer is not notified: a message given after tells it. Arguments and future as of ``write``. For small data, such as
        hidden states.
        """
        ...

    def sever(self, peer: NodeId) -> None:
        """End a connection, if one exists, without delivering anything; ``on_lost`` has been told when this returns."""
        ...

    def disconnect(self, peer: NodeId) -> None:
        """Close a connection after delivering the writes and messages given before."""
        ...

    def close(self) -> None:
        """Close all connections and stop listening; no thread, socket or memory segment is left."""
        ...
