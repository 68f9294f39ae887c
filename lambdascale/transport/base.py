"""The interface of a transport: a node's endpoint, and what it tells its node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from lambdascale.core import NodeId
from lambdascale.transport.cuda import DeviceMemory

# Of the host, or of a GPU.
Memory = memoryview | DeviceMemory


class TransportError(RuntimeError):
    """A connection that cannot be made or has broken; the message names the peer."""


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """What an endpoint calls, from threads of its own; they must return soon and not raise.

    ``on_write(peer, immediate, offset, size)``: a peer's write is complete in registered memory. ``on_message(peer, data)``: a
    message. ``on_lost(peer, reason)``: the connection is gone without having been closed; nothing more comes over it. Writes
    of one peer are told in the order they were given to its endpoint, and so are messages; a message does not wait for the
    writes given before it. ``on_checked(peer, immediate, offset, size, xxh3_64)`` is called instead of ``on_write`` by transports
    that have hashed the bytes as they moved them, while these were in a cache, which spares whoever verifies them a pass.
    """

    on_write: Callable[[NodeId, int, int, int], None]
    on_message: Callable[[NodeId, bytes], None]
    on_lost: Callable[[NodeId, str], None]
    on_checked: Callable[[NodeId, int, int, int, int], None] | None = None


class Endpoint(Protocol):
    """One node's end of a transport."""

    @property
    def address(self) -> str:
        """What a peer needs to connect; travels over the control channel."""
        ...

    @property
    def on_device(self) -> bool:
        """Whether peers write to a GPU's memory: then that is what ``allocate`` gives."""
        ...

    def allocate(self, size: int) -> Memory:
        """Touched memory of ``size`` bytes that this transport can register."""
        ...

    def register(self, memory: Memory) -> None:
        """The memory that peers may write to, before anybody connects. Not copied, not resized."""
        ...

    def register_source(self, memory: memoryview) -> None:
        """More memory that writes come from: whoever must prepare memory does it now, not for each write."""
        ...

    def expect(self, generations: Mapping[NodeId, int]) -> list[NodeId]:
        """Let in processes of these nodes only, of these generations or later; before the first call, of any node.

        Connections to earlier processes and to other nodes end, and ``on_lost`` has been told of them when this returns. Returns
        the nodes with a lower id than this one's that are not connected: this node has to connect to them.
        """
        ...

    def connect(self, peer: NodeId, address: str) -> None:
        """Connect to a peer with a lower id; TransportError if it cannot be reached or is not the process expected."""
        ...

    def admit(self, peer: NodeId) -> None:
        """Let the peer write to registered memory; counted. Where a transport cannot keep it out, it may write at any time.

        Until then, and after as many ``dismiss``, its writes wait. TransportError if it is not connected.
        """
        ...

    def dismiss(self, peer: NodeId) -> None:
        """Take an ``admit`` back, after all that the peer had to write has arrived (or it has said that it writes no more)."""
        ...

    def write(self, peer: NodeId, data: Memory, offset: int, immediate: int) -> Future[None]:
        """Bring ``data`` to ``offset`` in the peer's registered memory, then tell the peer ``immediate`` (64 bits, unsigned).

        The host's memory can always be written from, a GPU's where ``on_device``.
        Returns at once; the future is done when ``data`` may be changed again, or has a TransportError.
        """
        ...

    def send(self, peer: NodeId, data: bytes) -> Future[None]:
        """Send a message, in order with other messages to this peer, past the writes under way."""
        ...

    def disconnect(self, peer: NodeId) -> None:
        """End a connection on purpose; what was given before is delivered first."""
        ...

    def close(self) -> None:
        """End all connections and stop listening; no thread, socket or segment stays behind."""
        ...
