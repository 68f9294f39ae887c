"""What transports with a socket per peer have in common: listening, proving to belong to the cluster, keeping the connections.

A connection begins with a challenge either side answers with an HMAC of a key both ends know, so that nobody else's bytes reach
the memory; what follows is neither encrypted nor authenticated further: for trusted networks and loopback.
"""

from __future__ import annotations

import hmac
import mmap
import secrets
import socket
import struct
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from lambdascale.core import NodeId
from lambdascale.transport.base import Handlers, Memory, TransportError
from lambdascale.transport.pacing import TokenBucket

_HELLO = struct.Struct("!32sI")  # challenge, node
_PROOF_BYTES = 32
TIMEOUT_S = 20.0


class Connection(Protocol):
    """One peer."""

    peer: NodeId
    sock: socket.socket

    def start(self) -> None:
        """Begin: the endpoint knows the connection now. Must return soon."""
        ...

    def abandon(self) -> None:
        """Free everything; it has never been started."""
        ...

    def write(self, data: Memory, offset: int, immediate: int) -> Future[None]:
        """See Endpoint."""
        ...

    def send(self, data: bytes) -> Future[None]:
        """See Endpoint."""
        ...

    def finish(self) -> None:
        """Say goodbye after what was given, and wait until the peer has had it all."""
        ...


C = TypeVar("C", bound=Connection)


def flat(memory: Memory) -> Memory:
    """The same memory in bytes."""
    return memory.cast("B") if isinstance(memory, memoryview) and memory.nbytes else memory


def fill(sock: socket.socket, target: memoryview) -> None:
    """Receive exactly as much as ``target`` holds; EOFError if the connection ends before."""
    at = 0
    while at < len(target):
        count = sock.recv_into(target[at:])
        if count == 0:
            raise EOFError("the connection ended")
        at += count


class SocketEndpoint(ABC, Generic[C]):
    """The common part of an Endpoint, listening on ``host`` (loopback unless told otherwise). ``link`` paces all it sends."""

    on_device = False

    def __init__(
        self, node: NodeId, handlers: Handlers, key: bytes, *, host: str = "127.0.0.1", link: TokenBucket | None = None
    ) -> None:
        self.node = node
        self.handlers = handlers
        self.link = link
        self.memory: Memory = memoryview(bytearray())
        self._key = key
        self._lock = threading.Lock()
        self._connections: dict[NodeId, C] = {}
        self._admitting: dict[threading.Thread, socket.socket] = {}
        self._closed = False
        self._server = socket.create_server((host, 0))
        self._listener = threading.Thread(target=self._accept_all, name=f"accept-{node}", daemon=True)
        self._listener.start()

    @abstractmethod
    def make(self, peer: NodeId, sock: socket.socket) -> C:
        """A connection over a socket whose other end has proved to be ``peer``; OSError or EOFError if it cannot be made."""

    @property
    def address(self) -> str:
        """host:port."""
        host, port = self._server.getsockname()[:2]
        return f"{host}:{port}"

    def allocate(self, size: int) -> Memory:
        """See Endpoint. Any memory will do, unless a transport says otherwise."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        return memoryview(mmap.mmap(-1, max(1, size), flags=flags))[:size]

    def register(self, memory: Memory) -> None:
        """See Endpoint."""
        self.memory = flat(memory)

    def register_source(self, memory: memoryview) -> None:
        """See Endpoint. Sockets take any memory."""

    def connect(self, peer: NodeId, address: str) -> None:
        """See Endpoint."""
        host, _, port = address.rpartition(":")
        try:
            sock = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        except OSError as error:
            raise TransportError(f"node {peer} at {address} cannot be reached: {error}") from error
        try:
            found = self._shake(sock)
            if found != peer:
                raise TransportError(f"{address} is node {found}, not {peer}")
            connection = self.make(peer, sock)
        except (OSError, EOFError) as error:
            sock.close()
            raise TransportError(f"node {peer} at {address} does not answer as one of this cluster: {error}") from error
        except TransportError:
            sock.close()
            raise
        self._add(connection)

    def admit(self, peer: NodeId) -> None:
        """See Endpoint. Whoever is connected may write."""

    def dismiss(self, peer: NodeId) -> None:
        """See Endpoint."""

    def write(self, peer: NodeId, data: Memory, offset: int, immediate: int) -> Future[None]:
        """See Endpoint."""
        return self._connection(peer).write(data, offset, immediate)

    def send(self, peer: NodeId, data: bytes) -> Future[None]:
        """See Endpoint."""
        return self._connection(peer).send(data)

    def disconnect(self, peer: NodeId) -> None:
        """See Endpoint."""
        with self._lock:
            connection = self._connections.pop(peer, None)
        if connection is not None:
            connection.finish()

    def close(self) -> None:
        """See Endpoint."""
        with self._lock:
            self._closed = True
        # A blocked accept() is woken by shutting the socket down, and so is who waits for a stranger to introduce himself.
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._listener.join(TIMEOUT_S)
        with self._lock:
            settled = [connection.sock for connection in self._connections.values()]
        for thread, sock in list(self._admitting.items()):
            if sock not in settled:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT_S)
        for peer in list(self._connections):
            self.disconnect(peer)

    def forget(self, connection: C) -> None:
        """Called by a connection that is over."""
        with self._lock:
            if self._connections.get(connection.peer) is connection:
                del self._connections[connection.peer]

    def _connection(self, peer: NodeId) -> C:
        with self._lock:
            if peer not in self._connections:
                raise TransportError(f"node {peer} is not connected")
            return self._connections[peer]

    def _add(self, connection: C) -> None:
        with self._lock:
            refused = self._closed or connection.peer in self._connections
            if not refused:
                self._connections[connection.peer] = connection
                connection.start()
        if refused:
            connection.abandon()
            raise TransportError(f"node {connection.peer} is connected already")

    def _accept_all(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._admit, args=(sock,), name="admit", daemon=True)
            self._admitting[thread] = sock
            thread.start()

    def _admit(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(TIMEOUT_S)
            self._add(self.make(self._shake(sock), sock))
        except (OSError, EOFError, TransportError):
            sock.close()  # not one of us, or twice the same: the other side sees its connection end
        finally:
            del self._admitting[threading.current_thread()]

    def _shake(self, sock: socket.socket) -> NodeId:
        """Exchange challenges and prove to know the key, both ways; the peer's node id."""
        mine = secrets.token_bytes(32)
        sock.sendall(_HELLO.pack(mine, self.node))
        hello, proof = bytearray(_HELLO.size), bytearray(_PROOF_BYTES)
        fill(sock, memoryview(hello))
        theirs, peer = _HELLO.unpack(hello)
        sock.sendall(self._proof(theirs, self.node))
        fill(sock, memoryview(proof))
        if theirs == mine or not hmac.compare_digest(self._proof(mine, peer), bytes(proof)):
            raise EOFError("it does not know the cluster's key")
        return int(peer)

    def _proof(self, challenge: bytes, node: NodeId) -> bytes:
        return hmac.digest(self._key, challenge + struct.pack("!I", node), "sha256")
