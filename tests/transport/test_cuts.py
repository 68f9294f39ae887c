"""Connections that break between nodes that live: what is still written, what is told, and the way back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lambdascale.testing.transports import Heard
from lambdascale.transport import ShmEndpoint, TcpEndpoint, TokenBucket, TransportError, shm
from lambdascale.transport.leases import Lease, is_held, new_number

KEY = b"k" * 32
SIZE = 4 << 20
Pair = Callable[..., tuple[Any, Any, Heard, Heard]]


@pytest.fixture(params=[TcpEndpoint, ShmEndpoint])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Nodes 1 and 0, connected by node 1; what they heard."""
    with ExitStack() as stack:

        def make(link: TokenBucket | None = None) -> tuple[Any, Any, Heard, Heard]:
            heard = Heard(), Heard()
            one, zero = (request.param(node, h.handlers(), KEY, link=link) for node, h in zip((1, 0), heard, strict=True))
            for each in (one, zero):
                each.register(each.allocate(SIZE))
                stack.callback(each.close)
            one.connect(0, zero.address)
            return one, zero, *heard

        yield make


def test_a_receiver_that_leaves_frees_its_source(pair: Pair) -> None:
    """Writes that wait for a slow link fail at once, those behind them too."""
    one, zero, _, heard = pair(TokenBucket(1e6))
    writes = [one.write(0, memoryview(bytes(SIZE)), 0, number) for number in range(3)]
    zero.sever(1)
    for write in writes:
        with pytest.raises(TransportError):
            write.result(10)
    assert not heard.writes


def test_nothing_is_written_after_a_loss_was_told(pair: Pair) -> None:
    """The node may use its memory for something else from then on."""
    one, zero, _, heard = pair(TokenBucket(20e6))
    write = one.write(0, memoryview(b"x" * SIZE), 0, 1)
    while not zero.memory[0]:
        pass
    zero.sever(1)
    assert heard.lost
    zero.memory[:] = bytes(SIZE)
    with pytest.raises(TransportError):
        write.result(10)
    assert not any(bytes(zero.memory))


def test_a_loss_is_told_when_the_writer_has_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory: a peer that is in the middle of a copy when its connection breaks is waited for."""
    inside, go_on = threading.Event(), threading.Event()
    put = shm._Mapped.put

    def slow_put(self: Any, data: Any, at: int) -> None:
        inside.set()
        go_on.wait(10)
        put(self, data, at)

    monkeypatch.setattr(shm._Mapped, "put", slow_put)
    heard = Heard()
    one, zero = ShmEndpoint(1, Heard().handlers(), KEY), ShmEndpoint(0, heard.handlers(), KEY)
    memory = zero.allocate(SIZE)
    zero.register(memory)
    one.connect(0, zero.address)
    write = one.write(0, memoryview(b"x" * 100), 0, 1)
    assert inside.wait(10)
    severing = threading.Thread(target=zero.sever, args=(1,))
    severing.start()
    severing.join(0.2)
    assert severing.is_alive()
    assert not heard.lost
    go_on.set()
    severing.join(10)
    assert heard.lost
    with pytest.raises(TransportError):
        write.result(10)
    one.close()
    zero.close()


def test_leases() -> None:
    """Leases end when they are given up; each number stands for itself."""
    file = os.memfd_create("lease")
    first, second = (Lease(os.open(f"/proc/self/fd/{file}", os.O_RDWR), number) for number in (5, 6))
    assert (is_held(file, 5), is_held(file, 6), is_held(file, 7)) == (True, True, False)
    with pytest.raises(OSError, match="temporarily unavailable"):
        Lease(os.open(f"/proc/self/fd/{file}", os.O_RDWR), 5)
    first.close()
    assert (is_held(file, 5), is_held(file, 6)) == (False, True)
    second.close()
    os.close(file)
    assert not is_held(file, 6)
    assert 0 <= new_number() < 1 << 62
