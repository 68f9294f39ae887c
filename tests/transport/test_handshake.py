"""Connections to a node's data port: strangers that reflect, relay, repeat and hang up, and key holders in the wrong place."""

from __future__ import annotations

import errno
import hmac
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from lambdascale.testing.transports import Heard
from lambdascale.transport import ShmEndpoint, TcpEndpoint, TransportError, sockets

KEY = b"k" * 32
SIZE = 4096
KINDS = [TcpEndpoint, ShmEndpoint]


class Member:
    """An endpoint of the cluster, its memory and what it heard."""

    def __init__(self, kind: type[TcpEndpoint], node: int, generation: int = 0) -> None:
        self.heard = Heard()
        self.endpoint = kind(node, self.heard.handlers(), KEY, generation=generation)
        self.memory = self.endpoint.allocate(SIZE)
        self.endpoint.register(self.memory)

    @property
    def where(self) -> tuple[str, int]:
        host, _, port = self.endpoint.address.rpartition(":")
        return host, int(port)

    def connected(self) -> set[int]:
        return set(self.endpoint._connections)


Make = Callable[..., Member]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    before = set(threading.enumerate())
    with ExitStack() as stack:

        def member(node: int, generation: int = 0) -> Member:
            made = Member(request.param, node, generation)
            stack.callback(made.endpoint.close)
            return made

        yield member
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def exchange(stranger: socket.socket, data: bytes) -> bytes:
    """Send, and return all that comes until the other side hangs up."""
    stranger.settimeout(10)
    answer = b""
    with suppress(OSError):
        stranger.sendall(data)
        while part := stranger.recv(1000):
            answer += part
    return answer


def untouched(*members: Member) -> bool:
    return all(not any(bytes(m.memory)) and not m.heard.writes and not m.heard.messages and not m.heard.lost for m in members)


def hello(challenge: bytes, node: int, generation: int = 0) -> bytes:
    return struct.pack("!13s32sII", b"lambdascale/3", challenge, node, generation)


def pump(source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes] = lambda data: data) -> None:
    with suppress(OSError):
        while data := source.recv(1000):
            sink.sendall(change(data))
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def between(*pairs: tuple[socket.socket, socket.socket]) -> None:
    """Pass bytes on, both ways, until one side hangs up."""
    threads = [threading.Thread(target=pump, args=pair) for one, two in pairs for pair in ((one, two), (two, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)


def test_a_stranger_gets_no_proof(make: Make) -> None:
    """All that a node says to a caller that proves nothing is its own challenge: no oracle for other connections."""
    node = make(0)
    with socket.create_connection(node.where) as stranger:
        stranger.settimeout(10)
        stranger.sendall(hello(os.urandom(32), 1))
        said = stranger.recv(1000)
        assert len(said) == len(hello(b"", 0))
        assert exchange(stranger, os.urandom(32)) == b""
    assert untouched(node)


@pytest.mark.parametrize("claimed", [0, 1, 2])
def test_a_challenge_reflected_to_its_own_node(make: Make, claimed: int) -> None:
    """Two connections to the same node, each fed with what comes from the other; the id is replaced by the claimed one."""
    node = make(0)
    node.endpoint.expect({0: 0, 1: 0, 2: 0})

    def disguised(data: bytes) -> bytes:
        return hello(data[13:45], claimed) if data.startswith(b"lambdascale/3") else data

    with socket.create_connection(node.where) as one, socket.create_connection(node.where) as two:
        for each in (one, two):
            each.settimeout(10)
            with suppress(OSError):
                each.sendall(hello(b"c" * 32, claimed))
        threads = [threading.Thread(target=pump, args=(*pair, disguised)) for pair in ((one, two), (two, one))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert not node.connected()
    assert untouched(node)


def test_challenges_relayed_between_two_nodes(make: Make) -> None:
    """A stranger that poses as node 1 at node 0 has no proof from node 1, which proves nothing to callers."""
    zero, one = make(0), make(1)
    with socket.create_connection(zero.where) as first, socket.create_connection(one.where) as second:
        for each in (first, second):
            each.settimeout(10)
        first.sendall(hello(b"x" * 32, 1))
        challenge = first.recv(1000)[13:45]
        second.sendall(hello(challenge, 2))
        second.recv(1000)
        with suppress(OSError):
            second.sendall(b"p" * 32)
            first.sendall(second.recv(32) or b"p" * 32)
        assert exchange(first, b"") == b""
    assert not zero.connected()
    assert untouched(zero, one)


def test_somebody_in_between_at_another_address(make: Make) -> None:
    """A real node is told a wrong address, where somebody passes all bytes on to the right node: both notice."""
    zero, one = make(0), make(1)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def relay() -> None:
            caller, _ = server.accept()
            with caller, socket.create_connection(zero.where) as listener:
                between((caller, listener))

        thread = threading.Thread(target=relay)
        thread.start()
        host, port = server.getsockname()
        with pytest.raises(TransportError, match="does not answer as one of this cluster"):
            one.endpoint.connect(0, f"{host}:{port}")
        thread.join(10)
    assert not zero.connected()
    assert not one.connected()
    assert untouched(zero, one)


def test_a_storm_of_hang_ups_costs_nobody_a_connection(make: Make) -> None:
    """Bare handshakes, under the ids of nodes that live and of others, that hang up at each possible moment."""
    zero, one, two = make(0), make(1), make(2)
    for member in (zero, one, two):
        for peer in member.endpoint.expect({0: 0, 1: 0, 2: 0}):
            member.endpoint.connect(peer, (zero, one)[peer].endpoint.address)
    for member in (zero, one):
        for claimed in (0, 1, 2, 3, 77):
            for data in (
                b"",
                hello(b"c" * 32, claimed)[:20],
                hello(b"c" * 32, claimed, 9),
                hello(b"c" * 32, claimed) + b"p" * 32,
            ):
                with socket.create_connection(member.where) as stranger:
                    stranger.sendall(data)
    one.endpoint.send(0, b"still here").result(10)
    two.endpoint.send(0, b"and here").result(10)
    two.endpoint.send(1, b"and there").result(10)
    zero.heard.wait(lambda heard: len(heard.messages) == 2)
    one.heard.wait(lambda heard: len(heard.messages) == 1)
    assert [m.connected() for m in (zero, one, two)] == [{1, 2}, {0, 2}, {0, 1}]
    assert not any(m.heard.lost for m in (zero, one, two))


class Unsteady(socket.socket):
    """A listening socket whose first calls to ``accept`` fail, as if the caller had hung up or no descriptor was left."""

    failures: list[int]

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            number = self.failures.pop()
            raise OSError(number, os.strerror(number))
        return super().accept()


def test_a_call_that_cannot_be_accepted_does_not_end_the_listening(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node could not be connected to any more, and nobody was told."""

    def unsteady(address: tuple[str, int]) -> socket.socket:
        with real(address) as server:
            made = Unsteady(fileno=server.detach())
        made.failures = [errno.ECONNABORTED, errno.EMFILE]
        return made

    real = socket.create_server
    with monkeypatch.context() as now:
        now.setattr(sockets.socket, "create_server", unsteady)
        low = make(0)
    high = make(1)
    high.endpoint.connect(0, low.endpoint.address)
    assert low.connected() == {1}


def test_a_living_peer_keeps_its_connection_against_its_double(make: Make) -> None:
    """The key alone takes nobody's place: only a later process of the connected peer does."""
    zero, one, double = make(0), make(1), make(1)
    one.endpoint.connect(0, zero.endpoint.address)
    one.endpoint.send(0, b"before").result(10)
    zero.heard.wait(lambda heard: len(heard.messages) == 1)
    with pytest.raises(TransportError):
        double.endpoint.connect(0, zero.endpoint.address)
    one.endpoint.send(0, b"after").result(10)
    zero.heard.wait(lambda heard: len(heard.messages) == 2)
    assert not zero.heard.lost


def test_connecting_waits_until_the_listening_end_knows(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that is slow to take up a proven connection: the caller's ``connect`` does not return before it has."""
    zero, one = make(0), make(1)
    add = zero.endpoint._add

    def slowly(*args: Any) -> None:
        time.sleep(0.3)
        add(*args)

    monkeypatch.setattr(zero.endpoint, "_add", slowly)
    one.endpoint.connect(0, zero.endpoint.address)
    assert zero.connected() == {1}
    zero.endpoint.send(1, b"at once").result(10)


def test_a_listener_that_closes_while_it_is_called(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller whose proven connection is never taken up is told so, and keeps nothing."""
    zero, one = make(0), make(1)
    monkeypatch.setattr(zero.endpoint, "_closed", True)
    with pytest.raises(TransportError, match="refuses the connection"):
        one.endpoint.connect(0, zero.endpoint.address)
    assert not one.connected()
    monkeypatch.setattr(zero.endpoint, "_closed", False)


def test_two_processes_of_a_peer_that_prove_themselves_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two were let in before either was connected: the second is refused all the same."""
    zero, one, double = make(0), make(1), make(1)
    monkeypatch.setattr(zero.endpoint, "_check_caller", lambda caller: None)
    one.endpoint.connect(0, zero.endpoint.address)
    one.endpoint.send(0, b"before").result(10)
    zero.heard.wait(lambda heard: len(heard.messages) == 1)
    with pytest.raises(TransportError, match="refuses the connection"):
        double.endpoint.connect(0, zero.endpoint.address)
    assert not double.connected()
    one.endpoint.send(0, b"after").result(10)
    zero.heard.wait(lambda heard: len(heard.messages) == 2)
    assert not zero.heard.lost


def test_a_restarted_peer_takes_its_place(make: Make) -> None:
    """The node hears of the loss of the earlier process first, once."""
    zero, one, again = make(0), make(1), make(1, 1)
    one.endpoint.connect(0, zero.endpoint.address)
    one.endpoint.send(0, b"first").result(10)
    zero.heard.wait(lambda heard: len(heard.messages) == 1)
    again.endpoint.connect(0, zero.endpoint.address)
    again.endpoint.send(0, b"second").result(10)
    zero.heard.wait(lambda heard: len(heard.messages) == 2)
    one.heard.wait(lambda heard: bool(heard.lost))
    assert [peer for peer, _ in zero.heard.lost] == [1]
    assert zero.endpoint.expect({0: 0, 1: 1}) == []
    with pytest.raises(TransportError):
        one.endpoint.connect(0, zero.endpoint.address)


@pytest.mark.parametrize(("claimed", "generation"), [(0, 0), (3, 0), (1, 1)])
def test_key_holders_in_the_wrong_place(make: Make, claimed: int, generation: int) -> None:
    """One's own id, an id outside the directory, and a process that has been replaced."""
    zero = make(0)
    zero.endpoint.expect({0: 0, 1: 2, 2: 0})
    with socket.create_connection(zero.where) as caller:
        assert exchange(caller, hello(b"c" * 32, claimed, generation)) == b""
    assert untouched(zero)


def test_the_wrong_direction(make: Make) -> None:
    """Node 1 takes no connection from node 0, whatever node 0 can prove."""
    one = make(1)
    one.endpoint.expect({0: 0, 1: 0})
    with socket.create_connection(one.where) as caller:
        assert exchange(caller, hello(b"c" * 32, 0)) == b""
    assert not one.connected()


@pytest.mark.parametrize("role", ["listens", ""])
def test_a_proof_for_another_role(make: Make, role: str) -> None:
    """A listener's proof over the same challenges does not let a caller in."""
    zero = make(0)
    with socket.create_connection(zero.where) as caller:
        caller.settimeout(10)
        caller.sendall(hello(b"c" * 32, 1))
        theirs = caller.recv(1000)[13:45]
        parties = struct.pack("!IIII", 1, 0, 0, 0)
        said = (b"lambdascale/3", role.encode() + b"\0", b"c" * 32, theirs, parties, zero.endpoint.address.encode())
        assert exchange(caller, hmac.digest(KEY, b"".join(said), "sha256")) == b""
    assert not zero.connected()


def test_the_proof_that_lets_a_caller_in(make: Make) -> None:
    """The same by hand with the right role: the test above fails for the role, and for nothing else."""
    zero = make(0)
    with socket.create_connection(zero.where) as caller:
        caller.settimeout(10)
        caller.sendall(hello(b"c" * 32, 1))
        theirs = caller.recv(1000)[13:45]
        parties = struct.pack("!IIII", 1, 0, 0, 0)
        said = (b"lambdascale/3", b"calls\0", b"c" * 32, theirs, parties, zero.endpoint.address.encode())
        caller.sendall(hmac.digest(KEY, b"".join(said), "sha256"))
        assert len(caller.recv(32)) == 32


def test_slow_strangers_are_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte in time, and the whole too late: the deadline is for the handshake, not for a byte."""
    monkeypatch.setattr(sockets, "TIMEOUT_S", 0.3)
    zero = make(0)
    with socket.create_connection(zero.where) as stranger:
        stranger.settimeout(10)
        with suppress(OSError):
            for byte in hello(b"c" * 32, 1):
                stranger.sendall(bytes([byte]))
                stranger.settimeout(0.05)
                with suppress(TimeoutError):
                    if stranger.recv(1) == b"":
                        break
            else:
                pytest.fail("it was let in")
    assert untouched(zero)
