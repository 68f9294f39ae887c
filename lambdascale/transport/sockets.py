"""The common part of transports with a socket per peer: listening, letting in nodes of the cluster only, keeping connections.

A connection counts once both ends have proved to know the cluster's key (see handshake). Nodes connect to nodes with a lower
id, so that each pair has one connection; one's own id, ids outside the directory and replaced processes are refused.
"""

from __future__ import annotations

import mmap
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from typing import Generic, Protocol, TypeVar

from lambdascale.core import NodeId
from lambdascale.transport.base import Handlers, Memory, TransportError
from lambdascale.transport.handshake import Handshake, Party
from lambdascale.transport.pacing import TokenBucket

TIMEOUT_S = 20.0
# Connections that may be in their handshake at once. A cluster has 256 nodes at most; strangers get no more threads than this.
_MOST_ADMITTING = 512
# From a call that could not be accepted to the next: descriptors may be lacking for a while.
_AGAIN_S = 0.01
# What the end that listens sends when it knows a connection. Only then does ``connect`` return: both ends may use it at once.
_WELCOME = b"+"
_REPLACED = "its process has been replaced"


class Connection(Protocol):
    """A connection to one peer."""

    peer: NodeId
    sock: socket.socket

    def start(self) -> None:
        """Begin: the endpoint knows the connection now. Must return soon."""
        ...

    def abandon(self) -> None:
        """Free everything; it has never been started."""
        ...

    def write(self, data: Memory, offset: int, immediate: int, ways: Sequence[TokenBucket]) -> Future[None]:
        """See Endpoint. ``ways``: all that pace the write, the link among them."""
        ...

    def send(self, data: bytes) -> Future[None]:
        """See Endpoint."""
        ...

    def place(self, data: Memory, offset: int) -> Future[None]:
        """See Endpoint."""
        ...

    def finish(self) -> None:
        """Say goodbye after what was given, and wait until the peer has had it all."""
        ...

    def cut(self, reason: str) -> None:
        """End without a goodbye; what waits fails with ``reason``. Nothing more arrives when this returns. Not from a handler."""
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
    """The common part of an Endpoint, listening on ``host`` (loopback unless told otherwise). ``link`` paces all it sends.

    ``generation`` tells this process of the node from those the node had before.
    """

    on_device = False
    can_place = True

    def __init__(
        self,
        node: NodeId,
        handlers: Handlers,
        key: bytes,
        *,
        host: str = "127.0.0.1",
        link: TokenBucket | None = None,
        generation: int = 0,
    ) -> None:
        self.node = node
        self.handlers = handlers
        self.link = link
        self.memory: Memory = memoryview(bytearray())
        self._handshake = Handshake(key, Party(node, generation), TIMEOUT_S)
        # _lock guards the five below. An entry of _connections has one of _generations: which process of the peer it leads to.
        self._lock = threading.Lock()
        self._connections: dict[NodeId, C] = {}
        self._generations: dict[NodeId, int] = {}
        self._expected: Mapping[NodeId, int] | None = None
        self._admitting: dict[threading.Thread, socket.socket] = {}
        self._closed = False
        # Held while the node is told of a loss: expect() returns after all losses of replaced processes have been told.
        self._telling = threading.RLock()
        self._server = socket.create_server((host, 0))
        self._listener = threading.Thread(target=self._accept_all, name=f"accept-{node}", daemon=True)
        self._listener.start()

    @abstractmethod
    def make(self, peer: NodeId, sock: socket.socket) -> C:
        """Return a connection over a socket whose other end has proved to be ``peer``; OSError or EOFError if that fails."""

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

    # -- who may connect ---------------------------------------------------------------------------------------------

    def expect(self, generations: Mapping[NodeId, int]) -> list[NodeId]:
        """See Endpoint."""
        with self._lock:
            self._expected = dict(generations)
            replaced = [c for peer, c in self._connections.items() if self._objection(Party(peer, self._generations[peer]))]
        for connection in replaced:
            self._cut(connection, _REPLACED)
        self._hear_out()
        with self._lock:
            return [peer for peer in generations if peer < self.node and peer not in self._connections]

    def _objection(self, party: Party) -> str:
        """Return the directory's objection to a connection to ``party``, "" if it has none. Called with the lock."""
        if self._expected is None:
            return ""
        if party.node not in self._expected:
            return f"node {party.node} is not in the directory"
        wanted = self._expected[party.node]
        return f"process {party.generation} of node {party.node} was replaced by {wanted}" if party.generation < wanted else ""

    def _check_caller(self, caller: Party) -> None:
        with self._lock:
            objection = self._objection(caller)
            if caller.node <= self.node:
                objection = f"node {caller.node} may not connect to node {self.node}: only nodes with a higher id may"
            elif self._generations.get(caller.node, -1) >= caller.generation:
                objection = f"node {caller.node} is connected already"
        if objection:
            raise TransportError(objection)

    def _check_listener(self, peer: NodeId, address: str, listener: Party) -> None:
        if listener.node != peer:
            raise TransportError(f"{address} is node {listener.node}, not {peer}")
        with self._lock:
            objection = self._objection(listener)
        if objection:
            raise TransportError(objection)

    def sever(self, peer: NodeId) -> None:
        """See Endpoint."""
        with self._lock:
            connection = self._connections.get(peer)
        if connection is not None:
            self._cut(connection, "it was severed")
        self._hear_out()

    def _cut(self, connection: C, reason: str) -> None:
        connection.cut(reason)
        self.forget(connection, reason)

    def _hear_out(self) -> None:
        """Wait until the node has been told of the losses found so far."""
        with self._telling:
            pass

    def connect(self, peer: NodeId, address: str) -> None:
        """See Endpoint."""
        if peer >= self.node:
            raise TransportError(f"node {self.node} connects to nodes with a lower id, not to node {peer}")
        host, _, port = address.rpartition(":")
        try:
            sock = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        except OSError as error:
            raise TransportError(f"node {peer} at {address} cannot be reached: {error}") from error
        try:
            listener = self._handshake.call(sock, address, partial(self._check_listener, peer, address))
            sock.settimeout(TIMEOUT_S)
            connection = self.make(peer, sock)
        except (OSError, EOFError) as error:
            sock.close()
            raise TransportError(f"node {peer} at {address} does not answer as one of this cluster: {error}") from error
        except TransportError:
            sock.close()
            raise
        try:
            fill(sock, memoryview(bytearray(len(_WELCOME))))
        except (OSError, EOFError) as error:
            connection.abandon()
            sock.close()
            raise TransportError(f"node {peer} at {address} refuses the connection: {error}") from error
        self._add(connection, listener.generation)

    def admit(self, peer: NodeId) -> None:
        """See Endpoint. A connected peer may always write."""

    def dismiss(self, peer: NodeId) -> None:
        """See Endpoint."""

    def write(self, peer: NodeId, data: Memory, offset: int, immediate: int, over: TokenBucket | None = None) -> Future[None]:
        """See Endpoint."""
        connection, ways = self._connection(peer), [way for way in (self.link, over) if way is not None]
        return _queued(ways, lambda: connection.write(data, offset, immediate, ways))

    def send(self, peer: NodeId, data: bytes) -> Future[None]:
        """See Endpoint."""
        connection = self._connection(peer)
        return _queued(self._link(), lambda: connection.send(data))

    def place(self, peer: NodeId, data: Memory, offset: int) -> Future[None]:
        """See Endpoint."""
        connection = self._connection(peer)
        return _queued(self._link(), lambda: connection.place(data, offset))

    def _link(self) -> list[TokenBucket]:
        return [] if self.link is None else [self.link]

    def disconnect(self, peer: NodeId) -> None:
        """See Endpoint."""
        with self._lock:
            connection = self._connections.pop(peer, None)
            self._generations.pop(peer, None)
        if connection is not None:
            connection.finish()

    def close(self) -> None:
        """See Endpoint."""
        with self._lock:
            self._closed = True
        # Shutting the sockets down wakes a blocked accept(), and handshakes that wait for a peer.
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._listener.join(TIMEOUT_S)
        with self._lock:
            settled = [connection.sock for connection in self._connections.values()]
            admitting = list(self._admitting.items())
        for thread, sock in admitting:
            if sock not in settled:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT_S)
        for peer in list(self._connections):
            self.disconnect(peer)

    def forget(self, connection: C, lost: str = "") -> None:
        """Forget a connection that is over; the connection itself calls this.

        ``lost``: the reason to tell the node, "" after a goodbye. The node is told once of each connection, and not of one that
        it has disconnected or that has been forgotten before.
        """
        with self._telling:
            with self._lock:
                known = self._connections.get(connection.peer) is connection
                if known:
                    del self._connections[connection.peer], self._generations[connection.peer]
            if known and lost:
                self.handlers.on_lost(connection.peer, lost)

    def _connection(self, peer: NodeId) -> C:
        with self._lock:
            if peer not in self._connections:
                raise TransportError(f"node {peer} is not connected")
            return self._connections[peer]

    def _add(self, connection: C, generation: int, welcome: bytes = b"") -> None:
        """Use a proven connection. It takes the place of one to an earlier process of the peer, and of no other.

        ``welcome`` is sent then: it tells the end that called that this end knows the connection. OSError if that fails.
        """
        while True:
            with self._lock:
                before = self._connections.get(connection.peer)
                refused = self._closed or (before is not None and self._generations[connection.peer] >= generation)
                if not refused and before is None:
                    self._connections[connection.peer] = connection
                    self._generations[connection.peer] = generation
                    try:
                        connection.sock.sendall(welcome)
                    except OSError:
                        del self._connections[connection.peer], self._generations[connection.peer]
                        raise
                    connection.start()
                    return
            if refused or before is None:
                connection.abandon()
                raise TransportError(f"node {connection.peer} is connected already")
            self._cut(before, _REPLACED)

    def _accept_all(self) -> None:
        """Let callers in until the endpoint is closed. A call that fails for itself, or for lack of descriptors, ends nothing."""
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                with self._lock:
                    if self._closed:
                        return
                time.sleep(_AGAIN_S)
                continue
            thread = threading.Thread(target=self._admit, args=(sock,), name="admit", daemon=True)
            with self._lock:
                full = len(self._admitting) >= _MOST_ADMITTING
                if not full:
                    self._admitting[thread] = sock
            if full:
                sock.close()
            else:
                thread.start()

    def _admit(self, sock: socket.socket) -> None:
        try:
            caller = self._handshake.listen(sock, self.address, self._check_caller)
            sock.settimeout(TIMEOUT_S)
            connection = self.make(caller.node, sock)
            try:
                self._add(connection, caller.generation, _WELCOME)
            except OSError:
                connection.abandon()
                raise
        except (OSError, EOFError, TransportError):
            sock.close()  # a stranger, or refused: the other side sees its connection end
        finally:
            with self._lock:
                del self._admitting[threading.current_thread()]


def _queued(ways: Sequence[TokenBucket], give: Callable[[], Future[None]]) -> Future[None]:
    """Give a connection work, which paced ways know of until it is done: a sender that is late then makes that up."""
    with ExitStack() as ended:
        for way in ways:
            way.queued()
            ended.callback(way.done)
        future = give()
        done = ended.pop_all()
    future.add_done_callback(lambda _: done.close())
    return future
