"""Conformance of transports: the guarantees of an endpoint to its node, also after a peer is lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import xxhash

from lambdascale.testing.pacing import Counting
from lambdascale.transport import Endpoint, Handlers, Memory, TransportError

_WAIT_S = 30.0


class Heard:
    """Handlers that record writes, messages and losses."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int, int]] = []
        self.hashes: list[int] = []  # of the writes that came with one
        self.messages: list[tuple[int, bytes]] = []
        self.lost: list[tuple[int, str]] = []
        self._changed = threading.Condition()

    def handlers(self) -> Handlers:
        """Handlers for an endpoint."""
        return Handlers(
            on_write=lambda *write: self._keep(lambda: self.writes.append(write)),
            on_checked=lambda *write: self._keep(lambda: self._note_checked(write[:4], write[4])),
            on_message=lambda *message: self._keep(lambda: self.messages.append(message)),
            on_lost=lambda *loss: self._keep(lambda: self.lost.append(loss)),
        )

    def _note_checked(self, write: tuple[int, int, int, int], found: int) -> None:
        self.writes.append(write)
        self.hashes.append(found)

    def _keep(self, note: Callable[[], None]) -> None:
        with self._changed:
            note()
            self._changed.notify_all()

    def wait(self, condition: Callable[[Heard], bool]) -> None:
        """Wait until the condition holds; AssertionError after 30 s."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), _WAIT_S), f"heard only {self.writes[-3:]} {self.lost}"


class Node:
    """An endpoint, its registered memory of ``size`` bytes, and what its handlers recorded."""

    def __init__(self, endpoint: Endpoint, heard: Heard, size: int) -> None:
        self.endpoint, self.heard, self.memory = endpoint, heard, endpoint.allocate(size)
        endpoint.register(self.memory)


class TransportConformance:
    """Subclass and define ``make_endpoint``, and ``break_off``, which ends connections as a crash would.

    Registered memory may be a GPU's; ``source`` provides the memory that writes are sent from.
    """

    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        """Make an endpoint of the cluster under test."""
        raise NotImplementedError

    def break_off(self, endpoint: Endpoint) -> None:
        """End all connections of an endpoint without a goodbye."""
        raise NotImplementedError

    def source(self, data: bytes) -> Memory:
        """Memory with these bytes: host memory, unless overridden."""
        return memoryview(data)

    @pytest.fixture
    def nodes(self) -> Iterator[Callable[..., list[Node]]]:
        """Function that makes n nodes; they are closed at the end, and no thread may be left."""
        before = set(threading.enumerate())
        with ExitStack() as stack:

            def make(count: int, size: int = 1 << 20) -> list[Node]:
                made = []
                for node in range(count):
                    heard = Heard()
                    made.append(Node(self.make_endpoint(node, heard.handlers()), heard, size))
                    stack.callback(made[-1].endpoint.close)
                return made

            yield make
        deadline = time.monotonic() + _WAIT_S
        while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left, f"threads are left: {left}"

    def pair(self, nodes: Callable[..., list[Node]], size: int = 1 << 20) -> tuple[Node, Node]:
        """Two connected nodes: node 1, which has connected, and node 0."""
        two, one = nodes(2, size)
        one.endpoint.connect(0, two.endpoint.address)
        return one, two

    def test_a_write_lands_where_it_should(self, nodes: Callable[..., list[Node]]) -> None:
        """A write changes its own bytes only, and its immediate arrives with it."""
        one, two = self.pair(nodes)
        data = random.Random(1).randbytes(100_001)
        one.endpoint.write(0, self.source(data), 4097, 2**64 - 1).result(_WAIT_S)
        two.heard.wait(lambda heard: bool(heard.writes))
        assert two.heard.writes == [(1, 2**64 - 1, 4097, len(data))]
        assert two.heard.hashes in ([], [xxhash.xxh3_64_intdigest(data)])
        found = bytes(two.memory)
        assert found[4097 : 4097 + len(data)] == data
        assert not any(found[:4097])
        assert not any(found[4097 + len(data) :])

    @pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 24) + 3])
    def test_any_size(self, nodes: Callable[..., list[Node]], size: int) -> None:
        """Writes of no byte, one byte, and more than any buffer arrive."""
        one, two = self.pair(nodes, max(size, 1))
        data = random.Random(2).randbytes(size)
        one.endpoint.write(0, self.source(data), 0, 7).result(_WAIT_S)
        two.heard.wait(lambda heard: bool(heard.writes))
        assert bytes(two.memory[:size]) == data

    def test_a_write_takes_every_way(self, nodes: Callable[..., list[Node]]) -> None:
        """A way beside the link has had time for all bytes of the writes over it, and for no others; it is busy meanwhile."""
        one, two = self.pair(nodes)
        data, over = random.Random(3).randbytes(300_001), Counting(100e6)
        writes = [
            one.endpoint.write(0, self.source(data), 0, 1, over),
            one.endpoint.write(0, self.source(data), 400_000, 2),
            one.endpoint.write(0, self.source(data), 600_000, 3, over),
        ]
        one.endpoint.send(0, b"not over it").result(_WAIT_S)
        for write in writes:
            write.result(_WAIT_S)
        two.heard.wait(lambda heard: len(heard.writes) == 3)
        assert bytes(two.memory[600_000 : 600_000 + len(data)]) == data
        assert over.bytes == 2 * len(data)
        assert over.most_at_once >= 1
        over.settled(_WAIT_S)

    def test_writes_and_messages_keep_their_order(self, nodes: Callable[..., list[Node]]) -> None:
        """Writes arrive in their order, and so do messages."""
        one, two = self.pair(nodes)
        for index in range(200):
            one.endpoint.write(0, self.source(bytes([index])), index, index)
            one.endpoint.send(0, b"%d" % index)
        two.heard.wait(lambda heard: len(heard.messages) == len(heard.writes) == 200)
        assert [write[1] for write in two.heard.writes] == list(range(200))
        assert [data for _, data in two.heard.messages] == [b"%d" % index for index in range(200)]
        assert bytes(two.memory[:200]) == bytes(range(200))

    def test_what_is_placed_is_there_before_the_next_message(self, nodes: Callable[..., list[Node]]) -> None:
        """Placed data is not reported; the message that follows finds it, and nothing else has changed."""
        one, two = self.pair(nodes)
        if not one.endpoint.can_place:
            return
        for index in range(50):
            data = bytes([index + 1]) * 5000
            one.endpoint.place(0, self.source(data), 4096)
            one.endpoint.send(0, b"%d" % index)
            two.heard.wait(lambda heard: len(heard.messages) == index + 1)  # noqa: B023 (called at once)
            assert bytes(two.memory[4095:9097]) == b"\0" + data + b"\0"
        assert not two.heard.writes

    def test_placing_does_not_disturb_a_write(self, nodes: Callable[..., list[Node]]) -> None:
        """Data goes into the memory beside a write under way, whose bytes and hash are right."""
        size = 1 << 24
        one, two = self.pair(nodes, size + 4096)
        if not one.endpoint.can_place:
            return
        data = random.Random(5).randbytes(size)
        written = one.endpoint.write(0, self.source(data), 4096, 1)
        placed = [one.endpoint.place(0, self.source(bytes([index]) * 100), 100 * index) for index in range(40)]
        for future in (*placed, written):
            future.result(_WAIT_S)
        one.endpoint.send(0, b"done")
        two.heard.wait(lambda heard: bool(heard.writes and heard.messages))
        assert two.heard.writes == [(1, 1, 4096, size)]
        assert two.heard.hashes in ([], [xxhash.xxh3_64_intdigest(data)])
        assert bytes(two.memory[:4000]) == b"".join(bytes([index]) * 100 for index in range(40))
        assert bytes(two.memory[4096:]) == data

    def test_placing_outside_the_memory_ends_the_connection(self, nodes: Callable[..., list[Node]]) -> None:
        """Placing outside the memory is refused like a write outside it."""
        one, two = self.pair(nodes, 1000)
        if not one.endpoint.can_place:
            return
        one.endpoint.place(0, self.source(bytes([255]) * 600), 500)
        for node in (one, two):
            node.heard.wait(lambda heard: bool(heard.lost))
        assert not any(bytes(two.memory))

    def test_both_directions_at_once(self, nodes: Callable[..., list[Node]]) -> None:
        """Two ends of a connection may write at the same time."""
        one, two = self.pair(nodes, 1 << 22)
        data = random.Random(3).randbytes(1 << 21)
        one.endpoint.send(0, b"hello")
        two.heard.wait(lambda heard: bool(heard.messages))
        for _ in range(5):
            one.endpoint.write(0, self.source(data), 0, 1)
            two.endpoint.write(1, self.source(data), 1 << 21, 2)
        for node in (one, two):
            node.heard.wait(lambda heard: len(heard.writes) == 5)
        assert bytes(two.memory[: 1 << 21]) == bytes(one.memory[1 << 21 :]) == data

    def test_many_peers(self, nodes: Callable[..., list[Node]]) -> None:
        """Every peer gets what is sent to it, and nothing else."""
        *others, last = nodes(6)
        for peer, node in enumerate(others):
            last.endpoint.connect(peer, node.endpoint.address)
        for peer in range(5):
            last.endpoint.write(peer, self.source(bytes([peer + 1]) * 1000), 0, peer)
        for peer, node in enumerate(others):
            node.heard.wait(lambda heard: bool(heard.writes))
            assert bytes(node.memory[:1000]) == bytes([peer + 1]) * 1000

    def test_a_write_outside_the_memory_ends_the_connection(self, nodes: Callable[..., list[Node]]) -> None:
        """A write outside the memory changes nothing, and both ends report the connection as lost."""
        one, two = self.pair(nodes, 1000)
        one.endpoint.write(0, self.source(bytes([255]) * 600), 500, 1)
        for node in (one, two):
            node.heard.wait(lambda heard: bool(heard.lost))
        assert not any(bytes(two.memory))
        assert not two.heard.writes

    def test_a_peer_that_dies_is_noticed(self, nodes: Callable[..., list[Node]]) -> None:
        """The loss of a peer is reported once; later writes to it fail instead of vanishing."""
        one, two = self.pair(nodes)
        one.endpoint.send(0, b"hello")
        two.heard.wait(lambda heard: bool(heard.messages))
        self.break_off(two.endpoint)
        one.heard.wait(lambda heard: bool(heard.lost))
        assert [peer for peer, _ in one.heard.lost] == [0]
        with pytest.raises(TransportError):
            one.endpoint.write(0, self.source(b"x"), 0, 0).result(_WAIT_S)

    @pytest.mark.parametrize("by", [0, 1])
    def test_a_severed_connection_is_made_again(self, nodes: Callable[..., list[Node]], by: int) -> None:
        """Each end hears of the loss, once, before the new connection carries anything, in both directions."""
        one, two = self.pair(nodes)
        for count in (1, 2, 3):
            (two, one)[by].endpoint.sever(1 - by)
            assert len((two, one)[by].heard.lost) == count, "told when sever returns"
            for node in (one, two):
                node.heard.wait(lambda heard: len(heard.lost) == count)  # noqa: B023 (called at once)
            one.endpoint.connect(0, two.endpoint.address)
            for node, peer in ((one, 0), (two, 1)):
                node.endpoint.send(peer, b"again").result(_WAIT_S)
                node.endpoint.write(peer, self.source(bytes([count]) * 1000), 0, count).result(_WAIT_S)
            for node in (one, two):
                node.heard.wait(lambda heard: len(heard.messages) == len(heard.writes) == count)  # noqa: B023 (called at once)
                assert bytes(node.memory[:1001]) == bytes([count]) * 1000 + b"\0"
        assert [len(node.heard.lost) for node in (one, two)] == [3, 3]

    def test_severing_nothing(self, nodes: Callable[..., list[Node]]) -> None:
        """Severing a peer that is not connected changes nothing for others."""
        one, _ = self.pair(nodes)
        one.endpoint.sever(7)
        one.endpoint.send(0, b"still").result(_WAIT_S)
        assert not one.heard.lost

    def test_nothing_is_written_after_a_loss_was_told(self, nodes: Callable[..., list[Node]]) -> None:
        """The receiver may use its memory anew from then on, and the sender its own: no write waits for a peer that has left."""
        size = 1 << 24
        one, two = self.pair(nodes, size)
        writes = [one.endpoint.write(0, self.source(bytes([number]) * size), 0, number) for number in range(1, 5)]
        two.endpoint.sever(1)
        assert two.heard.lost, "told when sever returns"
        then, reported = bytes(two.memory), list(two.heard.writes)
        for write in writes:
            error = write.exception(_WAIT_S)
            assert error is None or isinstance(error, TransportError)
        one.heard.wait(lambda heard: bool(heard.lost))
        assert bytes(two.memory) == then
        assert two.heard.writes == reported

    def test_a_goodbye_is_no_loss(self, nodes: Callable[..., list[Node]]) -> None:
        """A goodbye arrives after everything sent before it, and is not reported as a loss."""
        one, two = self.pair(nodes, 1 << 23)
        data = random.Random(4).randbytes(1 << 23)
        future = one.endpoint.write(0, self.source(data), 0, 9)
        one.endpoint.disconnect(0)
        assert future.result(_WAIT_S) is None
        two.heard.wait(lambda heard: bool(heard.writes))
        assert bytes(two.memory) == data
        assert not one.heard.lost
        assert not two.heard.lost
        with pytest.raises(TransportError, match="not connected"):
            one.endpoint.send(0, b"x")

    def test_connecting_again(self, nodes: Callable[..., list[Node]]) -> None:
        """Two nodes can connect again after a goodbye."""
        one, two = self.pair(nodes)
        for round_ in range(3):
            one.endpoint.send(0, b"%d" % round_).result(_WAIT_S)
            two.heard.wait(lambda heard: len(heard.messages) == round_ + 1)  # noqa: B023 (called at once)
            one.endpoint.disconnect(0)
            one.endpoint.connect(0, two.endpoint.address)

    def test_both_ends_know_a_new_connection(self, nodes: Callable[..., list[Node]]) -> None:
        """The end that listens can send as soon as ``connect`` has returned at the other."""
        two, *others = nodes(4)
        for number, one in enumerate(others, start=1):
            one.endpoint.connect(0, two.endpoint.address)
            two.endpoint.send(number, b"welcome").result(_WAIT_S)
            one.heard.wait(lambda heard: bool(heard.messages))

    def test_nobody_there(self, nodes: Callable[..., list[Node]]) -> None:
        """A peer that has closed cannot be reached."""
        two, one = nodes(2)
        address = two.endpoint.address
        two.endpoint.close()
        with pytest.raises(TransportError, match="node 0"):
            one.endpoint.connect(0, address)

    def test_the_wrong_node(self, nodes: Callable[..., list[Node]]) -> None:
        """Connecting to an address that belongs to another node is refused."""
        other, _, one = nodes(3)
        with pytest.raises(TransportError, match="is node 0, not 1"):
            one.endpoint.connect(1, other.endpoint.address)

    def test_only_nodes_with_a_higher_id_connect(self, nodes: Callable[..., list[Node]]) -> None:
        """The other direction, and a node with itself, is refused."""
        one, two = nodes(2)
        for peer, address in ((1, two.endpoint.address), (0, one.endpoint.address)):
            with pytest.raises(TransportError, match="lower id"):
                one.endpoint.connect(peer, address)

    def test_expected_nodes_only(self, nodes: Callable[..., list[Node]]) -> None:
        """A node outside the directory is refused; a connection to one that leaves the directory ends, and the node is told."""
        two, one, other = nodes(3)
        assert two.endpoint.expect({0: 0, 1: 0}) == []
        assert one.endpoint.expect({0: 0, 1: 0}) == [0]
        one.endpoint.connect(0, two.endpoint.address)
        one.endpoint.send(0, b"hello")
        two.heard.wait(lambda heard: bool(heard.messages))
        with pytest.raises(TransportError):
            other.endpoint.connect(0, two.endpoint.address)
        assert one.endpoint.expect({0: 0, 1: 0}) == []
        assert one.endpoint.expect({1: 0, 2: 0}) == []
        one.heard.wait(lambda heard: bool(heard.lost))
        assert [peer for peer, _ in one.heard.lost] == [0]
        two.heard.wait(lambda heard: bool(heard.lost))

    def test_a_replaced_process(self, nodes: Callable[..., list[Node]]) -> None:
        """Connecting to an earlier process fails once the directory names a later generation."""
        two, one = nodes(2)
        one.endpoint.connect(0, two.endpoint.address)
        assert one.endpoint.expect({0: 1, 1: 0}) == [0]
        one.heard.wait(lambda heard: bool(heard.lost))
        assert [peer for peer, _ in one.heard.lost] == [0]
        with pytest.raises(TransportError):
            one.endpoint.connect(0, two.endpoint.address)
