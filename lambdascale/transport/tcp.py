"""TCP transport: writes are received directly at their final place in registered memory."""

from __future__ import annotations

import socket
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from lambdascale.core import NodeId
from lambdascale.transport.base import Memory, TransportError
from lambdascale.transport.pacing import TokenBucket, grant
from lambdascale.transport.sockets import TIMEOUT_S, SocketEndpoint, fill, flat

_HEAD = struct.Struct("!BQQQ")  # kind, immediate, offset, size
# Frames: a piece of a write; the write's hash, if the sender has it; its completion; a message; the end of the connection; data
# placed ahead of writes.
_DATA, _HASH, _WRITTEN, _MESSAGE, _BYE, _PLACED = range(6)
_LARGEST_MESSAGE = 1 << 30
# Memory that a message may take before any of it has come; afterwards, as much again as has come.
_UNSEEN_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 20
# Largest piece of a write; messages are sent between pieces.
_PIECE_BYTES = 1 << 20
# Size of the parts that are received and then hashed: small enough to stay in a core's cache in between.
_HASHED_BYTES = 1 << 18


class Reachable(Protocol):
    """A peer's memory that can be written to without the socket, ``step_bytes`` at a time; used by one thread."""

    nbytes: int
    step_bytes: int

    def put(self, data: Memory, at: int) -> None:
        """Copy a piece to its place; the copy may still be under way when this returns. OSError if it fails."""
        ...

    def complete(self) -> int | None:
        """Wait until all that was put has been copied. Returns the hash (xxh3_64) of these bytes, where it was computed."""
        ...

    def place(self, data: Memory, at: int) -> None:
        """Copy data there, beside what is being put, and wait for it. OSError if it fails."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...

    def wait_for_peer(self) -> None:
        """Return when the peer has released this node's memory likewise, or is dead; the connection has ended."""
        ...


@dataclass
class _Job:
    """A write or message to send. ``ways``: all that pace a write."""

    kind: int
    immediate: int
    offset: int
    payload: Memory
    ways: Sequence[TokenBucket] = ()
    done: Future[None] = field(default_factory=Future)


class _Connection:
    """A socket with a thread for each direction."""

    def __init__(self, endpoint: TcpEndpoint, peer: NodeId, sock: socket.socket, theirs: Reachable | None) -> None:
        self.peer = peer
        self._theirs = theirs
        self.sock = sock
        self._endpoint = endpoint
        self._messages: deque[_Job] = deque()
        self._writes: deque[_Job] = deque()
        # Guards both queues, _ending, _reason and _left.
        self._lock = threading.Lock()
        self._given = threading.Condition(self._lock)
        self._ending = False
        self._reason = ""
        self._broken = False  # ended without a goodbye: nothing more is sent, nor written to the peer's memory
        self._left = 0
        self._hash: xxhash.xxh3_64 | None = None  # of the write that is being received
        self._told: int | None = None  # its hash as computed by the sender
        sock.settimeout(None)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.threads = [
            threading.Thread(target=work, name=f"tcp-{name}-{peer}", daemon=True)
            for name, work in (("send", self._send_all), ("receive", self._receive_all))
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def abandon(self) -> None:
        """See Connection."""
        self._let_go()
        self.sock.close()

    def _let_go(self) -> None:
        """Release the peer's memory: nothing is written any more."""
        if self._theirs is not None:
            self._theirs.close()

    def write(self, data: Memory, offset: int, immediate: int, ways: Sequence[TokenBucket]) -> Future[None]:
        """See Connection."""
        return self._give(_WRITTEN, immediate, offset, data, ways)

    def send(self, data: bytes) -> Future[None]:
        """See Connection."""
        return self._give(_MESSAGE, 0, 0, memoryview(data))

    def place(self, data: Memory, offset: int) -> Future[None]:
        """See Connection."""
        return self._give(_PLACED, 0, offset, flat(data))

    def _give(self, kind: int, immediate: int, offset: int, payload: Memory, ways: Sequence[TokenBucket] = ()) -> Future[None]:
        """Queue a write or message; return its future."""
        job = _Job(kind, immediate, offset, payload, ways)
        with self._given:
            if self._reason:
                job.done.set_exception(TransportError(f"node {self.peer}: {self._reason}"))
            else:
                (self._messages if kind in (_MESSAGE, _PLACED) else self._writes).append(job)
                self._given.notify()
        return job.done

    def finish(self) -> None:
        """See Connection."""
        self._give(_BYE, 0, 0, memoryview(b""))
        self._end(self._reason or "disconnected")
        self._join()
        if self.threads[1].is_alive():
            self._wake()
            self._join()

    def _join(self) -> None:
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(TIMEOUT_S)

    def _wake(self) -> None:
        """Shut the socket down, so that calls waiting on it return."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def _leave(self) -> None:
        """Count a finished thread; the last one closes the socket, which no call uses any more."""
        with self._lock:
            self._left += 1
            last = self._left == len(self.threads)
        if last:
            self.sock.close()

    def _end(self, reason: str) -> None:
        """Accept nothing any more; the first reason counts. The sending thread leaves once it is through."""
        with self._given:
            self._reason = self._reason or reason
            self._ending = True
            self._given.notify()

    def _break(self, reason: str) -> None:
        """End the connection: nothing is accepted or sent any more. The receiving thread tells the node, after its last deed."""
        self._end(reason)
        self._broken = True
        self._wake()

    def cut(self, reason: str) -> None:
        """See Connection."""
        self._break(reason)
        self.threads[1].join(TIMEOUT_S)

    # -- sending -----------------------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        while (job := self._next()) is not None:
            self._carry_out(job)
        # After all data, the peer sees the end of this side's stream, and with it that nothing writes to its memory any more.
        self._let_go()
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self._leave()

    def _next(self) -> _Job | None:
        """Wait for the next job and return it, messages first; None when the connection ends and nothing is left."""
        with self._given:
            while not self._messages and not self._writes:
                if self._ending:
                    return None
                self._given.wait()
            return self._messages.popleft() if self._messages else self._writes.popleft()

    def _carry_out(self, job: _Job) -> None:
        try:
            self._check_whole()
            self._write(job) if job.kind == _WRITTEN else self._send(job)
        except Exception as error:
            _print_unforeseen(error)
            if self._theirs is not None:
                with suppress(OSError):
                    self._theirs.complete()  # the memory that a copy under way reads may be changed afterwards
            job.done.set_exception(TransportError(f"node {self.peer}: {error}"))
            self._break(str(error))
        else:
            job.done.set_result(None)

    def _send(self, job: _Job) -> None:
        """Send a message or a goodbye, or place data."""
        bucket = self._endpoint.link
        if bucket is not None and job.payload.nbytes:
            bucket.cut_in(job.payload.nbytes)
        if job.kind == _PLACED and self._theirs is not None:
            self._check_whole()
            self._check_room(self._theirs, job)
            self._theirs.place(job.payload, job.offset)
            return
        assert isinstance(job.payload, memoryview), "a message is on the host"
        self._sendall(_HEAD.pack(job.kind, job.immediate, job.offset, job.payload.nbytes), job.payload)

    def _write(self, job: _Job) -> None:
        """Move the bytes in pieces, with messages in between, then announce that they are complete."""
        theirs = self._theirs
        if theirs is not None:
            self._check_room(theirs, job)
        data, step = flat(job.payload), _PIECE_BYTES if theirs is None else theirs.step_bytes
        for place in self._steps(len(data), step, job.ways):
            self._check_whole()
            piece = data[place.start : place.stop]
            if theirs is None:
                assert isinstance(piece, memoryview), "sockets take the host's memory"
                self._sendall(_HEAD.pack(_DATA, 0, job.offset + place.start, len(piece)), piece)
            else:
                theirs.put(piece, job.offset + place.start)
            self._send_messages()
        written = None if theirs is None else theirs.complete()
        if written is not None:
            self._sendall(_HEAD.pack(_HASH, written, 0, 0), memoryview(b""))
        self._sendall(_HEAD.pack(_WRITTEN, job.immediate, job.offset, job.payload.nbytes), memoryview(b""))

    def _check_whole(self) -> None:
        """Raise if the connection has broken meanwhile: the peer may use its memory for something else soon."""
        if self._broken:
            raise OSError(self._reason)

    @staticmethod
    def _check_room(theirs: Reachable, job: _Job) -> None:
        if job.offset + job.payload.nbytes > theirs.nbytes:
            raise EOFError(f"a write to bytes {job.offset} to {job.offset + job.payload.nbytes} of {theirs.nbytes}")

    def _steps(self, size: int, largest: int, ways: Sequence[TokenBucket]) -> Iterator[range]:
        """Yield the places of ``size`` bytes in steps of at most ``largest``, each when all ``ways`` have had time for it."""
        at = 0
        while at < size:
            granted, wait_s = grant(ways, size - at)
            self._rest(wait_s)
            for begin in range(at, at + granted, largest):
                yield range(begin, min(begin + largest, at + granted))
            at += granted

    def _rest(self, wait_s: float) -> None:
        """Wait while the link is busy with the piece that follows, and send messages meanwhile."""
        until = time.monotonic() + wait_s
        while (left_s := until - time.monotonic()) > 0:
            with self._given:
                if not self._messages:
                    self._given.wait(left_s)
            self._send_messages()

    def _send_messages(self) -> None:
        """Send the messages that wait."""
        while self._messages:
            self._carry_out(self._messages.popleft())

    def _sendall(self, head: bytes, payload: memoryview) -> None:
        sent = self.sock.sendmsg([head, payload])
        if sent < len(head):
            self.sock.sendall(head[sent:])
            sent = len(head)
        if sent < len(head) + payload.nbytes:
            self.sock.sendall(payload.cast("B")[sent - len(head) :])

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _receive_all(self) -> None:
        """Receive to the end; then the node hears of it, when nothing of this peer can change its memory any more."""
        lost = False
        try:
            while self._receive_one():
                pass
        except Exception as error:  # also a handler's exception: bytes that were not recorded must not seem delivered
            _print_unforeseen(error)
            self._break(str(error) or "the connection has ended")
            lost = True
        if self._theirs is not None:
            self._theirs.wait_for_peer()
        self._endpoint.forget(self, self._reason if lost else "")
        self._end("the peer has disconnected")  # the peer sees this side's end now, and may connect anew
        self._leave()

    def _receive_one(self) -> bool:
        head = bytearray(_HEAD.size)
        fill(self.sock, memoryview(head))
        kind, immediate, offset, size = _HEAD.unpack(head)
        if kind == _BYE:
            return False
        handlers = self._endpoint.handlers
        if kind in (_DATA, _WRITTEN, _PLACED):
            memory = self._endpoint.memory
            if offset + size > len(memory):
                raise EOFError(f"it writes to bytes {offset} to {offset + size} of {len(memory)}")
            if kind == _WRITTEN:
                self._complete(immediate, offset, size)
            else:
                assert isinstance(memory, memoryview), "who can reach a GPU's memory does not send"
                target = memory[offset : offset + size]
                self._receive_piece(target) if kind == _DATA else fill(self.sock, target)
        elif kind == _HASH:
            self._told = immediate
        elif kind == _MESSAGE and size <= _LARGEST_MESSAGE:
            handlers.on_message(self.peer, self._receive_message(size))
        else:
            raise EOFError(f"it sends something unknown (kind {kind}, {size} bytes)")
        return True

    def _receive_message(self, size: int) -> bytes:
        """Receive a message; no more memory is taken than a little more than has come of it."""
        data = bytearray()
        while len(data) < size:
            begin = len(data)
            data.extend(bytes(min(size - begin, max(begin, _UNSEEN_BYTES))))
            with memoryview(data) as target:
                fill(self.sock, target[begin:])
        return bytes(data)

    def _receive_piece(self, target: memoryview) -> None:
        if self._endpoint.handlers.on_checked is None:
            fill(self.sock, target)
            return
        self._hash = self._hash or xxhash.xxh3_64()
        for begin in range(0, len(target), _HASHED_BYTES):
            part = target[begin : begin + _HASHED_BYTES]
            fill(self.sock, part)
            self._hash.update(part)

    def _complete(self, immediate: int, offset: int, size: int) -> None:
        """Report a complete write, with its hash if it has been computed."""
        handlers, found = self._endpoint.handlers, self._told if self._hash is None else self._hash.intdigest()
        self._hash = self._told = None
        if handlers.on_checked is None or found is None:
            handlers.on_write(self.peer, immediate, offset, size)
        else:
            handlers.on_checked(self.peer, immediate, offset, size, found)


def _print_unforeseen(error: Exception) -> None:
    """Print an exception that is no connection's end: a fault of ours, after which the connection ends as well."""
    if not isinstance(error, OSError | EOFError):
        traceback.print_exception(error)


class TcpEndpoint(SocketEndpoint[_Connection]):
    """An Endpoint over TCP."""

    def make(self, peer: NodeId, sock: socket.socket) -> _Connection:
        """See SocketEndpoint."""
        return _Connection(self, peer, sock, self.introduce(peer, sock))

    def introduce(self, peer: NodeId, sock: socket.socket) -> Reachable | None:
        """Exchange what the transport needs between ends that trust each other. Returns the peer's memory if it is reachable."""
        return None
