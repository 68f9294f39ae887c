"""Parts of the rdma transport that do not need verbs: choices, frames, and both ends' bookkeeping over a fake wire."""

from __future__ import annotations

import ipaddress
import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.core import UserError
from lambdascale.transport import TransportError, rdma
from lambdascale.transport.rdma import RdmaOptions, frames
from lambdascale.transport.rdma.frames import Assembly, Card, Frame, Gather, Kind, RailCard, Receives
from lambdascale.transport.rdma.gate import Gate
from lambdascale.transport.rdma.inbox import Inbox
from lambdascale.transport.rdma.outbox import Outbox, Source
from lambdascale.transport.rdma.ports import Gid, GidType, Port, choose
from lambdascale.transport.rdma.watch import Watch


def gid(index: int, address: str, kind: GidType = "RoCE v2") -> Gid:
    return Gid(index=index, kind=kind, address=ipaddress.IPv6Address(address))


def port(device: str = "mlx5_0", number: int = 1, **changes: Any) -> Port:
    gids = (gid(0, "fe80::1", "RoCE v1"), gid(1, "fe80::1"), gid(2, "::ffff:10.0.0.1", "RoCE v1"), gid(3, "::ffff:10.0.0.1"))
    usual = {"active": True, "infiniband": False, "lid": 0, "mtu": 4096, "rate_bytes_per_s": 50e9, "gids": gids}
    return Port(device=device, number=number, **(usual | changes))


class TestChoice:
    def test_of_the_gid(self) -> None:
        """RoCE v2 is preferred, and a routable address to a link-local one."""
        (choice,) = choose([port()], RdmaOptions(), "127.0.0.1")
        assert (choice.gid.index, choice.mtu) == (3, 4096)

    def test_of_the_port(self) -> None:
        """The port with the node's own address is preferred, then the fastest; ports that are down are not used."""
        down = port("a", active=False, rate_bytes_per_s=100e9)
        slow, fast = port("b", rate_bytes_per_s=10e9, gids=(gid(0, "::ffff:10.0.0.9"),)), port("c")
        assert choose([down, slow, fast], RdmaOptions(), "127.0.0.1")[0].port.device == "c"
        assert choose([down, slow, fast], RdmaOptions(), "10.0.0.9")[0].port.device == "b"

    def test_of_rails(self) -> None:
        """Rails have the order in which devices are named."""
        choices = choose([port("a"), port("b"), port("c")], RdmaOptions(devices=("c", "a"), mtu=1024, gid_index=1), "127.0.0.1")
        assert [(c.port.device, c.mtu, c.gid.index) for c in choices] == [("c", 1024, 1), ("a", 1024, 1)]

    @pytest.mark.parametrize(
        ("ports", "options", "says"),
        [
            ([], RdmaOptions(), "rdma link add"),
            ([port()], RdmaOptions(devices=("mlx5_7",)), "mlx5_7"),
            ([port()], RdmaOptions(port=2), "no port 2"),
            ([port(active=False)], RdmaOptions(), "active"),
            ([port(gids=())], RdmaOptions(), "no GID"),
            ([port()], RdmaOptions(gid_index=9), "index 9"),
            ([port(mtu=1024)], RdmaOptions(mtu=4096), "1024"),
        ],
    )
    def test_of_what_is_not_there(self, ports: list[Port], options: RdmaOptions, says: str) -> None:
        with pytest.raises(UserError, match=says):
            choose(ports, options, "127.0.0.1")

    @pytest.mark.parametrize(
        "wrong", [{"mtu": 1500}, {"depth": 1}, {"chunk_bytes": 1}, {"port": 0}, {"gid_index": -1}, {"devices": ("a", "a")}]
    )
    def test_of_what_cannot_be(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(UserError):
            RdmaOptions(**wrong)


def test_without_pyverbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what to install."""
    monkeypatch.setitem(__import__("sys").modules, "pyverbs", None)
    monkeypatch.delitem(__import__("sys").modules, "lambdascale.transport.rdma.endpoint", raising=False)
    with pytest.raises(UserError, match=r"lambdascale\[rdma\]"):
        rdma.load()


@given(size=st.integers(0, 1 << 16), step=st.integers(1, 1 << 14), rails=st.integers(1, 4))
def test_chunks_cover_a_write_once(size: int, step: int, rails: int) -> None:
    step = max(step, size // 50, 1)
    pieces = list(frames.chunks(size, step, rails))
    assert [piece.begin for piece in pieces] == list(range(0, max(size, 1), step))
    assert sum(piece.size for piece in pieces) == size
    used = frames.rails_used(size, step, rails)
    assert {piece.rail for piece in pieces} == set(range(used))
    for rail in range(used):
        assert [piece.last for piece in pieces if piece.rail == rail][-1:] == [True]
    assert sum(piece.last for piece in pieces) == used


def test_writes_are_told_in_order_of_their_serials() -> None:
    gather = Gather()
    first, second = frames.announcement(0, 2, 2**64 - 1, 5, 9), frames.announcement(1, 1, 7, 0, 0)
    assert gather.landed(0) == gather.announce(second) == gather.landed(1) == gather.announce(first) == []
    assert gather.landed(0) == [first, second]
    assert (frames.rails_of(first), frames.size_of(first), first.first) == (2, 9, 2**64 - 1)


def test_nonsense_is_no_frame() -> None:
    with pytest.raises(ValueError, match="frame of 0 bytes"):
        frames.decode(memoryview(b""))
    with pytest.raises(ValueError, match="0 is not a valid Kind"):
        frames.decode(memoryview(bytes(frames.HEAD_BYTES)))
    with pytest.raises(ValueError, match="message"):
        Assembly(10).add(11, memoryview(b""))
    assert frames.decode(memoryview(Frame(Kind.BYE, first=3).encode())) == Frame(Kind.BYE, first=3)


class FakeSlots:
    piece_bytes, key = 16, 0

    def __init__(self, count: int) -> None:
        self.free = deque(range(count))
        self._filled: dict[int, bytes] = {}

    def address(self, slot: int) -> int:
        return slot

    def fill(self, slot: int, frame: Frame, piece: memoryview) -> int:
        self._filled[slot] = frame.encode() + bytes(piece)
        return len(self._filled[slot])

    def content(self, slot: int) -> bytes:
        return self._filled[slot]


class FakeLane:
    """A queue pair whose requests arrive when the test decides; like hardware, it counts the peer's receives."""

    def __init__(self, end: End, posted: int, spare: int, depth: int) -> None:
        self.receives = Receives(posted)
        self._end, self._depth = end, depth
        self.peer_receives = posted + spare
        self.under_way: deque[tuple[Callable[[End, int], bool | None], bool, Callable[[], None] | None]] = deque()

    @property
    def has_room(self) -> bool:
        return sum(chunk for _, chunk, _ in self.under_way) < self._depth

    def send(self, address: int, size: int, key: int, done: Callable[[], None] | None) -> None:
        data = memoryview(self._end.slots.content(address))
        self.under_way.append((lambda end, rail: end.inbox.frame(data), False, done))

    def bind(self, window: object, done: Callable[[], None]) -> None:
        self.under_way.append((lambda end, rail: None, False, done))

    def write(self, address: int, size: int, key: int, *, to: int, remote_key: int, immediate: int | None, done: Any) -> None:
        data = self._end.source[address : address + size].copy()

        def arrive(end: End, rail: int) -> bool | None:
            end.memory[to : to + size] = data
            return None if immediate is None else end.inbox.immediate(immediate)

        self.under_way.append((arrive, True, done))


class End:
    """One end of a connection: its outbox and its inbox."""

    def __init__(self, rails: int, posted: int, size: int, step: int, key: int = 9) -> None:
        self.source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
        self.memory = np.zeros(size, np.uint8)
        self.slots = FakeSlots(4)
        spare = 8 * rails
        self.lanes = [FakeLane(self, posted, spare if rail == 0 else 0, depth=3) for rail in range(rails)]
        card = Card(0, size, posted, tuple(RailCard(0, 0, 0, b"", 4096, False, key) for _ in range(rails)))
        self.outbox = Outbox(self.lanes, self.slots, card, step)
        self.written: list[tuple[int, int, int]] = []
        self.messages: list[bytes] = []
        self.inbox = Inbox(lambda *write: self.written.append(write), self.messages.append, self._credited, self._new_keys)

    def _credited(self, rail: int, count: int) -> None:
        self.lanes[rail].receives.credits += count

    def _new_keys(self, keys: list[int]) -> None:
        self.outbox.keys = keys

    def write(self, begin: int, size: int, immediate: int) -> Future[None]:
        source = Source(begin, size, [0] * len(self.lanes), lambda: None)
        return self.outbox.write(memoryview(b""), source, begin, immediate)

    def post(self) -> bool:
        step = self.outbox.step()
        if step is not None:
            step.post()
        return step is not None

    def deliver(self, rail: int, peer: End) -> bool:
        """Deliver the oldest request of a rail; the peer posts the receive again at once, and its credit comes back later."""
        lane = self.lanes[rail]
        if not lane.under_way:
            return False
        arrive, _, done = lane.under_way.popleft()
        counts = arrive(peer, rail)
        if counts is not None:
            lane.peer_receives -= 1
            assert lane.peer_receives >= 0, "nothing is sent that no receive waits for"
            lane.peer_receives += 1
            back = peer.lanes[rail].receives.used() if counts else 0
            if back:
                peer.outbox.credit(rail, back)
        if done is not None:
            done()
        return True


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), rails=st.integers(1, 3), posted=st.integers(2, 9), step=st.integers(1, 40))
def test_two_ends_and_a_wire(seed: int, rails: int, posted: int, step: int) -> None:
    """Everything sent arrives in order, whatever the delivery order of the rails, and neither end waits forever."""
    chance = random.Random(seed)
    size = 300
    ends = [End(rails, posted, size, step) for _ in range(2)]
    given_writes: list[list[tuple[int, int, int]]] = [[], []]
    given_messages: list[list[bytes]] = [[], []]
    futures = []
    for number in range(30):
        which = chance.randrange(2)
        if chance.random() < 0.5:
            begin = chance.randrange(size)
            length = chance.randrange(size - begin + 1)
            futures.append(ends[which].write(begin, length, number))
            given_writes[which].append((number, begin, length))
        else:
            data = chance.randbytes(chance.randrange(60))
            futures.append(ends[which].outbox.message(data))
            given_messages[which].append(data)
    for end in ends:
        end.outbox.goodbye()
    idle = 0
    while idle < 200:
        which, rail = chance.randrange(2), chance.randrange(rails)
        moved = ends[which].post() if chance.random() < 0.5 else ends[which].deliver(rail, ends[1 - which])
        idle = 0 if moved else idle + 1
    assert all(future.done() for future in futures)
    for which in range(2):
        assert ends[1 - which].written == given_writes[which]
        assert ends[1 - which].messages == given_messages[which]
        assert ends[which].inbox.peer_has_left
        for _, begin, length in given_writes[which]:
            assert (ends[1 - which].memory[begin : begin + length] == ends[which].source[begin : begin + length]).all()


def test_what_waits_fails_with_the_connection() -> None:
    end = End(1, 4, 100, 10)
    released = []
    future = end.outbox.write(memoryview(b""), Source(0, 50, [0], lambda: released.append(1)), 0, 1)
    end.post()
    assert end.outbox.fail() == [future]
    assert released == [1]


def test_a_write_outside_the_peers_memory() -> None:
    end = End(1, 4, 100, 10)
    end.write(90, 20, 1)
    with pytest.raises(TransportError, match="90 to 110 of 100"):
        end.post()


def test_watch() -> None:
    """The watch thread runs jobs, and ends."""
    watch = Watch("watch", lambda: None)
    names: list[str] = []
    watch.call_and_wait(lambda: names.append(watch.thread.name), 10)
    watch.close()
    assert names == ["watch"]
    assert not watch.thread.is_alive()


class FakeWindow:
    def __init__(self, key: int) -> None:
        self.key, self.closed = key, False

    def close(self) -> None:
        self.closed = True


def test_a_write_waits_until_it_is_admitted() -> None:
    """Windows open with the first admission and close with the last dismissal; the peer knows keys only while they are valid."""
    one, two = End(2, 8, 100, 10, key=0), End(2, 8, 100, 10, key=0)
    windows: list[FakeWindow] = []

    def window(region: object, rail: int) -> FakeWindow:
        windows.append(FakeWindow(7 + len(windows)))
        return windows[-1]

    for lane in two.lanes:
        lane.window = window
    gate = Gate(two.lanes, two.outbox, object(), threading.RLock())

    def settle() -> None:
        while any([one.post(), two.post(), *(a.deliver(r, b) for a, b in ((one, two), (two, one)) for r in range(2))]):
            pass

    future = one.write(0, 50, 1)
    settle()
    assert not future.done()
    assert one.outbox.is_shut_out
    for _ in range(2):
        gate.admit()
    settle()
    assert future.done()
    assert one.outbox.keys == [7, 8]
    gate.dismiss()
    settle()
    assert not any(w.closed for w in windows)
    gate.dismiss()
    settle()
    assert [w.closed for w in windows] == [True, True]
    assert one.outbox.keys == []
    gate.admit()
    gate.dismiss()  # before the window was open
    settle()
    assert [w.closed for w in windows] == [True] * 4
    assert one.outbox.keys == []
    assert one.write(0, 0, 2).done() is False
    settle()
    assert two.written == [(1, 0, 50), (2, 0, 0)]
    gate.dismiss()  # for a plan that an earlier connection admitted
    gate.admit()
    settle()
    assert len(windows) == 6
    gate.dismiss()
    settle()
    assert all(w.closed for w in windows)
