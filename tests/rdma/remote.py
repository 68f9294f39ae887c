"""Endpoints in another machine: a proxy for the conformance suite, and the server behind it."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing.managers import BaseManager
from typing import Any

from lambdascale.core import NodeId
from lambdascale.transport import Endpoint, Handlers, TokenBucket, TransportError
from lambdascale.transport.rdma import RdmaOptions, load

KEY = b"k" * 32
PORT = 7000
STANDING = RdmaOptions(windows=False)  # every connected peer may write, since the suite admits none


class Host:
    """Server that owns endpoints and stores their events until they are fetched."""

    def __init__(self) -> None:
        self._endpoints: dict[int, Endpoint] = {}
        self._memories: dict[int, memoryview] = {}
        self._events: dict[int, queue.SimpleQueue[tuple[Any, ...]]] = {}
        self._numbers = itertools.count()

    def make(self, node: NodeId, host: str) -> int:
        number = next(self._numbers)
        events = self._events[number] = queue.SimpleQueue()
        handlers = Handlers(
            on_write=lambda *write: events.put(("on_write", *write)),
            on_message=lambda *message: events.put(("on_message", *message)),
            on_lost=lambda *loss: events.put(("on_lost", *loss)),
        )
        self._endpoints[number] = load()(node, handlers, KEY, host=host, options=STANDING)
        return number

    def call(self, number: int, name: str, *arguments: Any) -> Any:
        return getattr(self._endpoints[number], name)(*arguments)

    def address(self, number: int) -> str:
        return self._endpoints[number].address

    def allocate(self, number: int, size: int) -> None:
        self._memories[number] = self._endpoints[number].allocate(size)

    def register(self, number: int) -> None:
        self._endpoints[number].register(self._memories[number])

    def read(self, number: int, begin: int | None, end: int | None) -> bytes:
        return bytes(self._memories[number][begin:end])

    def give(self, number: int, ticket: int, name: str, *arguments: Any) -> None:
        """Start a write or message; the event ("done", ticket, error) follows."""
        events = self._events[number]
        if name == "write":
            peer, data, *rest = arguments
            future = self._endpoints[number].write(peer, memoryview(data), *rest)
        else:
            future = self._endpoints[number].send(*arguments)
        future.add_done_callback(lambda done: events.put(("done", ticket, str(done.exception() or ""))))

    def sever(self, number: int, ticket: int, peer: NodeId) -> None:
        """Sever a connection; the event ("done", ticket, "") follows that of its loss."""
        self._endpoints[number].sever(peer)
        self._events[number].put(("done", ticket, ""))

    def events(self, number: int) -> list[tuple[Any, ...]]:
        """Fetch the stored events, after waiting briefly for one."""
        found = []
        try:
            found.append(self._events[number].get(timeout=0.2))
            while True:
                found.append(self._events[number].get_nowait())
        except queue.Empty:
            return found

    def break_off(self, number: int) -> None:
        break_off(self._endpoints[number])

    def leave(self) -> None:
        threading.Timer(0.2, os._exit, (0,)).start()


class Manager(BaseManager):
    pass


_host = Host()
Manager.register("host", callable=lambda: _host)


def break_off(endpoint: Any) -> None:
    for connection in list(endpoint._connections.values()):
        connection.sock.shutdown(socket.SHUT_RDWR)


def reach(address: str, patience_s: float) -> Any:
    """Wait for the other machine's Host and return a proxy for it."""
    manager = Manager((address, PORT), authkey=KEY)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            manager.connect()
            return manager.host()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


class RemoteMemory:
    """Read-only view of memory in the other machine."""

    def __init__(self, host: Any, number: int) -> None:
        self._host, self._number = host, number

    def __getitem__(self, where: slice) -> bytes:
        data: bytes = self._host.read(self._number, where.start, where.stop)
        return data

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return self[:] == other

    __hash__ = None


class RemoteEndpoint:
    """See Endpoint; its memory is a RemoteMemory."""

    can_place = False  # as its endpoint: memory windows admit a plan's writes only

    def __init__(self, host: Any, node: NodeId, handlers: Handlers, address: str) -> None:
        self._host, self._handlers = host, handlers
        self._number = host.make(node, address)
        self._tickets = itertools.count()
        self._futures: dict[int, Future[None]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        address: str = self._host.address(self._number)
        return address

    def allocate(self, size: int) -> Any:
        self._host.allocate(self._number, size)
        return RemoteMemory(self._host, self._number)

    def register(self, memory: Any) -> None:
        self._host.register(self._number)

    def register_source(self, memory: memoryview) -> None:
        raise NotImplementedError

    def expect(self, generations: dict[NodeId, int]) -> list[NodeId]:
        missing: list[NodeId] = self._host.call(self._number, "expect", generations)
        return missing

    def connect(self, peer: NodeId, address: str) -> None:
        self._host.call(self._number, "connect", peer, address)

    def write(self, peer: NodeId, data: memoryview, offset: int, immediate: int, over: TokenBucket | None = None) -> Future[None]:
        assert over is None, "a bucket paces threads of its own process"
        return self._give("write", peer, bytes(data), offset, immediate)

    def send(self, peer: NodeId, data: bytes) -> Future[None]:
        return self._give("send", peer, data)

    def _give(self, name: str, *arguments: Any) -> Future[None]:
        ticket = next(self._tickets)
        future = self._futures[ticket] = Future()
        self._host.give(self._number, ticket, name, *arguments)  # it may have ended before this returns
        return future

    def sever(self, peer: NodeId) -> None:
        ticket = next(self._tickets)
        future = self._futures[ticket] = Future()
        self._host.sever(self._number, ticket, peer)
        future.result(60)

    def disconnect(self, peer: NodeId) -> None:
        self._host.call(self._number, "disconnect", peer)

    def close(self) -> None:
        self._host.call(self._number, "close")
        self._closed.set()
        self._thread.join()

    def break_off(self) -> None:
        self._host.break_off(self._number)

    def _listen(self) -> None:
        while not self._closed.is_set():
            for name, *arguments in self._host.events(self._number):
                if name == "done":
                    self._finish(*arguments)
                else:
                    getattr(self._handlers, name)(*arguments)

    def _finish(self, ticket: int, error: str) -> None:
        future = self._futures.pop(ticket)
        future.set_exception(TransportError(error)) if error else future.set_result(None)


if __name__ == "__main__":
    import sys

    Manager((sys.argv[1], PORT), authkey=KEY).get_server().serve_forever()
