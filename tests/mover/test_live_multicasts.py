"""A node's multicasts and broadcasts, one job at a time: what is reported, passed on and freed, and when."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lambdascale.core import MulticastPlan
from lambdascale.core.commands import EvictBlocks, LoadBlocks
from lambdascale.core.plan import Send
from lambdascale.live import wire
from lambdascale.live.node.sending import BLOCK_BITS, FENCE
from tests.unit.node_doubles import BLOCKS, Network, Node, chain, multicast, start

ALL = list(range(BLOCKS))


@pytest.mark.parametrize("lands", ["gpu", "host"])
def test_a_chain_of_three(network: Network, make: Callable[..., Node], lands: str) -> None:
    """Every destination reports every block once, on the device, in the plan's order."""
    nodes = [make(number, lands=lands, held="gpu" if number == 0 else "") for number in range(3)]
    start(multicast(1, chain(0, 1, 2)), *nodes)
    network.run()
    for node in nodes[1:]:
        assert node.arrived == ALL
        assert node.store.resident("tiny", "gpu") == set(ALL)
        assert node.endpoint.admitted == []
    assert not any(node.failed or node.faults for node in nodes)


@pytest.mark.parametrize("middle", ["host", "gpu"])
def test_resident_blocks_count_as_arrived(network: Network, make: Callable[..., Node], middle: str) -> None:
    """A destination that holds a copy where blocks land, or on the device, reports every block; nobody sends it one.

    It passes them on all the same.
    """
    nodes = [make(0, lands="host", held="gpu"), make(1, lands="host", held=middle), make(2, lands="host")]
    start(multicast(1, chain(0, 1, 2)), *nodes)
    network.run()
    assert sorted(nodes[1].arrived) == nodes[2].arrived == ALL
    assert nodes[1].store.resident("tiny", "gpu") == set(ALL)
    assert {(ready.block, ready.offset) for ready in nodes[1].endpoint.asked} == {(block, None) for block in ALL}


def test_blocks_on_the_device_count_as_arrived(network: Network, make: Callable[..., Node]) -> None:
    """Blocks count wherever others land, and where only some of them are resident."""
    nodes = [make(0, held="gpu"), make(1)]
    nodes[1].store.load("tiny", [2, 5], keep_host=False).wait(30)
    start(multicast(1, chain(0, 1)), *nodes)
    network.run()
    assert sorted(nodes[1].arrived) == ALL
    assert {ready.block for ready in nodes[1].endpoint.asked if ready.offset is None} == {2, 5}


def test_a_resident_block_without_room_on_the_device(network: Network, make: Callable[..., Node]) -> None:
    """The transfer fails: the block is not passed over in silence."""
    node = make(1, lands="host", held="host")
    for key in [("other", block) for block in ALL]:
        node.store._tiers["gpu"].take(node.model, key)
    start(multicast(4, chain(0, 1)), node)
    node.run()
    assert node.arrived == []
    assert {(failed.transfer_id, failed.model) for failed in node.failed} == {(4, "tiny")}
    assert "no room" in node.failed[0].reason


@pytest.mark.parametrize("lands", ["gpu", "host"])
def test_a_block_is_verified_before_it_counts(network: Network, make: Callable[..., Node], lands: str) -> None:
    """Turns go on while it is verified; it is reported and passed on only afterwards."""
    source, middle, last = (make(number, lands=lands, held="gpu" if number == 0 else "") for number in range(3))
    start(multicast(1, chain(0, 1, 2)), source, middle, last)
    network.settle()
    assert network.deliver()
    for node in (middle, source, middle):
        node.thread.run()
    assert [ready.block for ready in middle.endpoint.asked] == [0, 1], "the next turn does not wait for the verification"
    assert [(write[0], write[1]) for write in network.writes] == [(0, 1)], "nothing is passed on yet"
    assert middle.arrived == []
    middle.worker.run()
    middle.thread.run()
    assert middle.arrived == [0]
    assert (1, 2) in [(write[0], write[1]) for write in network.writes]


def test_a_damaged_block_is_neither_reported_nor_passed_on(network: Network, make: Callable[..., Node]) -> None:
    source, middle, last = (make(number, held="gpu" if number == 0 else "") for number in range(3))
    start(multicast(1, chain(0, 1, 2)), source, middle, last)
    network.settle()
    network.deliver(damage=True)
    network.run()
    assert 0 not in middle.arrived + last.arrived
    (failed,) = middle.failed
    assert failed.transfer_id == 1
    assert failed.reason.startswith("block 0 of tiny")
    # The controller calls it off and plans anew.
    for node in (source, middle, last):
        node.mover.cancel(1)
    start(multicast(2, chain(0, 1, 2)), source, middle, last)
    network.run()
    assert sorted(middle.arrived) == sorted(last.arrived) == ALL


@pytest.mark.parametrize("verify", ["off", "full"])
def test_verification_can_be_switched_off(
    network: Network, make: Callable[..., Node], verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, node = make(0, held="gpu"), make(1)
    object.__setattr__(node.store.config, "verify", verify)
    start(multicast(1, chain(0, 1)), source, node)
    network.settle()
    network.deliver(damage=True)
    network.run()
    assert (0 in node.arrived) == (verify == "off")


def test_a_block_is_reported_once(network: Network, make: Callable[..., Node]) -> None:
    """Two multicasts bring the same blocks; and a write that nobody asked for counts for nothing."""
    sources, node = [make(0, held="gpu"), make(1, held="gpu")], make(2)
    start(multicast(1, chain(0, 2)), sources[0], node)
    start(multicast(2, chain(1, 2)), sources[1], node)
    network.settle()
    network.deliver()
    node.mover.written(0, 1 << BLOCK_BITS | 0)
    node.mover.written(1, 2 << BLOCK_BITS | 7)
    network.run()
    assert sorted(node.arrived) == ALL
    assert not node.failed


def test_what_one_multicast_has_brought_another_need_not(network: Network, make: Callable[..., Node]) -> None:
    """A write that is under way is waited for all the same."""
    sources, node = [make(0, held="gpu"), make(1, held="gpu")], make(2)
    start(multicast(1, chain(0, 2)), sources[0], node)
    start(multicast(2, chain(1, 2)), sources[1], node)
    network.settle()
    (late,) = [write for write in network.writes if write[0] == 1]
    network.writes.remove(late)
    network.run()
    assert node.arrived == ALL
    assert node.mover._multicasts.receiving.is_receiving("tiny")
    network.writes.append(late)
    network.run()
    assert not node.mover._multicasts.receiving.is_receiving("tiny")
    assert [ready.offset is None for ready in node.endpoint.asked if ready.transfer_id == 2] == [False] + [True] * (BLOCKS - 1)
    assert node.arrived == ALL


class TestCancelled:
    @pytest.fixture
    def three(self, network: Network, make: Callable[..., Node]) -> tuple[Node, Node]:
        """A source whose first write is under way, and its receiver."""
        source, node = make(0, held="gpu"), make(1)
        start(multicast(1, chain(0, 1)), source, node)
        network.settle()
        assert len(network.writes) == 1
        return source, node

    def test_memory_is_kept_until_the_fence(self, network: Network, three: tuple[Node, Node]) -> None:
        """The write under way may still come: nobody else gets its memory before the sender is known to be through."""
        source, node = three
        everything = node.store.free_bytes("gpu")
        source.mover.cancel(1), node.mover.cancel(1)
        network.settle()
        assert node.store.awaited("tiny", 0)
        assert node.store.free_bytes("gpu") == everything
        assert node.endpoint.admitted == [0]
        network.run()
        assert node.arrived == [0], "what has arrived counts"
        assert node.store.free_bytes("gpu") > everything
        assert node.endpoint.admitted == []

    def test_memory_is_kept_while_a_block_is_verified(self, network: Network, three: tuple[Node, Node]) -> None:
        """The worker reads it; what it finds right counts."""
        _, node = three
        before = node.store.free_bytes("gpu")
        network.deliver()
        node.thread.run()
        node.mover.cancel(1)
        node.mover.written(0, 1 << BLOCK_BITS | FENCE)
        node.thread.run()
        assert node.store.free_bytes("gpu") == before
        network.settle()
        assert node.arrived == [0]
        assert node.store.free_bytes("gpu") > before

    def test_a_fence_frees_the_memory(self, network: Network, make: Callable[..., Node]) -> None:
        """A sender whose turn it was and that has written nothing."""
        node = make(1)
        before = node.store.free_bytes("gpu")
        start(multicast(1, chain(0, 1)), node)
        node.mover.cancel(1)
        node.run()
        assert node.store.free_bytes("gpu") < before
        node.mover.written(0, 1 << BLOCK_BITS | FENCE)
        node.run()
        assert node.store.free_bytes("gpu") == before

    def test_a_sender_that_never_began_sends_a_fence(self, network: Network, make: Callable[..., Node]) -> None:
        """The sender's command waits, or has failed; receivers that ask it for blocks must not keep memory for it for ever."""
        source, node = make(0), make(1)
        start(multicast(1, chain(0, 1)), node)
        network.run()
        source.mover.cancel(1), node.mover.cancel(1)
        network.run()
        assert not node.store.awaited("tiny", 0)

    def test_a_load_waits_for_the_fence(self, network: Network, three: tuple[Node, Node]) -> None:
        source, node = three
        source.mover.cancel(1), node.mover.cancel(1)
        node.mover.load(LoadBlocks(3, "tiny", 1, tuple(ALL), (1,) * BLOCKS, "ssd", "pipelined"))
        node.run()
        assert not node.mover._loads._loads
        network.run()
        node.finish_loads()
        assert sorted(node.arrived) == ALL

    def test_a_lost_sender_frees_its_memory(self, network: Network, three: tuple[Node, Node]) -> None:
        _, node = three
        network.writes.clear()
        node.mover.cancel(1)
        node.mover.lost(0)
        node.run()
        assert not node.store.awaited("tiny", 0)

    def test_a_lost_sender_is_asked_for_nothing(self, network: Network, three: tuple[Node, Node]) -> None:
        _, node = three
        network.writes.clear()
        asked = len(node.endpoint.asked)
        node.mover.lost(0)
        network.settle()
        assert len(node.endpoint.asked) == asked

    def test_a_new_connection_is_admitted_by_new_plans_alone(self, network: Network, three: tuple[Node, Node]) -> None:
        """The old plan ends later, with a block that was being verified when its connection was lost: it closes nothing."""
        _, node = three
        network.deliver()
        node.thread.run()
        node.mover.lost(0)
        node.mover.cancel(1)
        node.thread.run()
        assert node.arrived == []
        node.endpoint.admitted.clear()  # with the connection
        start(multicast(2, chain(0, 1)), node)
        node.thread.run()
        network.settle()
        assert node.arrived == [0]
        assert node.endpoint.admitted == [0]

    def test_a_plan_that_began_without_a_connection(self, network: Network, make: Callable[..., Node]) -> None:
        """A plan that was never admitted closes nothing at its end that a later plan needs."""
        node = make(1)
        node.endpoint.lost.add(0)
        start(multicast(1, chain(0, 1)), node)
        node.run()
        assert node.endpoint.admitted == []
        node.endpoint.lost.clear()
        start(multicast(2, chain(0, 1)), node)
        node.run()
        node.mover.cancel(1)
        node.run()
        assert node.endpoint.admitted == [0]

    def test_what_has_ended_is_not_remembered_for_ever(self, network: Network, make: Callable[..., Node]) -> None:
        source = make(0)
        for number in range(3000):
            source.mover.cancel(number)
        source.run()
        assert len(source.mover._multicasts.sending._ended) <= 1024


def test_a_multicast_whose_sender_has_no_room_for_a_host_copy(network: Network, make: Callable[..., Node]) -> None:
    """The failure names the transfer, and its receivers' memory is freed once it is called off."""
    source, node = make(0, lands="host", held="gpu"), make(1, lands="host")
    for key in [("other", block) for block in ALL]:
        source.store._tiers["host"].take(source.model, key)
    start(multicast(6, chain(0, 1)), source, node)
    network.run()
    assert [failed.transfer_id for failed in source.failed] == [6]
    node.mover.cancel(6)
    network.run()
    assert not node.store.awaited("tiny", 0)


class TestFailures:
    """Every failure names a transfer or a model, or ends the node."""

    def test_of_a_transfer(self, make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
        node = make(1)
        monkeypatch.setattr(node.mover._multicasts, "start", lambda command: 1 / 0)
        start(multicast(9, chain(0, 1)), node)
        node.run()
        assert [(failed.command, failed.transfer_id) for failed in node.failed] == [("StartMulticast", 9)]
        assert "ZeroDivisionError" in node.failed[0].reason

    def test_of_a_write(self, make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
        node = make(1)
        monkeypatch.setattr(node.mover._multicasts, "written", lambda *_: 1 / 0)
        node.mover.written(0, 5 << BLOCK_BITS | 1)
        node.run()
        assert [failed.transfer_id for failed in node.failed] == [5]

    def test_of_verification(self, network: Network, make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
        """A fault of ours on the worker, not a damaged block."""
        source, node = make(0, held="gpu"), make(1)
        monkeypatch.setattr(node.store, "block_hash", lambda data: 1 / 0)
        start(multicast(9, chain(0, 1)), source, node)
        network.run()
        assert {failed.transfer_id for failed in node.failed} == {9}
        assert node.arrived == []
        node.mover.cancel(9)
        node.run()
        assert not node.store.awaited("tiny", 0)

    def test_of_nothing_in_particular(self, make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
        node = make(1)
        monkeypatch.setattr(node.mover._multicasts, "lost", lambda peer: 1 / 0)
        node.mover.lost(3)
        node.run()
        assert node.failed == []
        assert node.faults == ["the loss of node 3: node 1: ZeroDivisionError: division by zero"]

    def test_of_a_cancellation_or_release(self, make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
        """The controller would do nothing about a transfer that it has cancelled, or about memory that is never freed."""
        node = make(1, held="gpu")
        monkeypatch.setattr(node.mover._multicasts, "cancel", lambda number: 1 / 0)
        monkeypatch.setattr(node.store, "evict", lambda name, tier: 1 / 0)
        node.mover.cancel(3)
        node.mover.evict(EvictBlocks(1, "tiny", "gpu"))
        node.run()
        assert node.failed == []
        assert [fault.partition(":")[0] for fault in node.faults] == ["the cancellation of transfer 3", "EvictBlocks"]
        assert not node.mover._order._held, "later commands go on"

    def test_of_a_host_copy(self, make: Callable[..., Node]) -> None:
        node, placed = make(1), list[str]()
        for key in [("other", block) for block in ALL]:
            node.store._tiers["host"].take(node.model, key)
        node.mover.place_copy("tiny", lambda: placed.append("tiny"))
        node.run()
        assert [(failed.command, failed.model) for failed in node.failed] == [("PlaceCopy", "tiny")]
        assert placed == []


def test_one_send_at_a_time(network: Network, make: Callable[..., Node]) -> None:
    """Two receivers have asked; a paced link carries one block after the other."""
    source, one, two = make(0, held="gpu"), make(1), make(2)
    plan = MulticastPlan((0, 1, 2), (0,), 1, ((Send(0, 1, 0),), (Send(0, 2, 0),)))
    start(multicast(1, plan), source, one, two)
    for receiver in (1, 2):
        network.settle()
        assert [write[1] for write in network.writes] == [receiver]
        network.deliver()


def test_a_lost_receiver_holds_up_nobody(network: Network, make: Callable[..., Node]) -> None:
    """Sends to others go on."""
    source, node = make(0, held="gpu"), make(2)
    rounds = tuple((Send(0, 1 + index % 2, index // 2),) for index in range(2 * BLOCKS))
    start(multicast(1, MulticastPlan((0, 1, 2), (0,), BLOCKS, rounds)), source, node)
    source.mover.ready(1, wire.Ready(1, 0, 0))
    source.endpoint.lost.add(1)
    network.run()
    assert node.arrived == [0]
    source.mover.lost(1)
    network.run()
    assert node.arrived == ALL


def test_a_job_after_the_end_is_dropped(make: Callable[..., Node]) -> None:
    node = make(1)
    node.mover.close()
    node.mover.lost(2)
    assert not node.faults
