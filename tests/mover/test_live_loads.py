"""A node's loads, host copies, releases and evictions, one job at a time, with real stores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from lambdascale.core.commands import EvictBlocks, LoadBlocks, ReleaseNode
from lambdascale.core.events import BlockArrived, CommandFailed
from lambdascale.live.node.jobs import About
from lambdascale.live.node.loads import Links
from lambdascale.live.node.order import Order
from lambdascale.live.node.reports import Reports
from lambdascale.transport import TokenBucket
from tests.unit.node_doubles import BLOCKS, Network, Node, chain, multicast

ALL = list(range(BLOCKS))


def load(number: int, tier: Any = "ssd", loader: Any = "pipelined", node: int = 5) -> LoadBlocks:
    return LoadBlocks(number, "tiny", node, tuple(ALL), (1,) * BLOCKS, tier, loader)


def release(node: Node, keep_host: bool = False, after: Future[None] | None = None) -> None:
    if after is None:
        after = Future[None]()
        after.set_result(None)
    node.mover.release(ReleaseNode(5, "tiny", 1, keep_host), after)


class Counted(TokenBucket):
    """A link that counts what passes it and takes no time."""

    def __init__(self) -> None:
        super().__init__(1.0, sleep=lambda _: None)
        self.passed = 0
        self.queues: list[int] = []

    def reserve(self, size_bytes: int, **_: float) -> float:
        self.passed += size_bytes
        self.queues.append(self._queued)
        return 0.0


class TestLoads:
    @pytest.mark.parametrize("lands", ["gpu", "host"])
    @pytest.mark.parametrize("loader", ["pipelined", "sequential"])
    def test_each_block_is_reported_in_order(self, make: Callable[..., Node], lands: str, loader: str) -> None:
        """A sequential load keeps no copy in host memory."""
        node = make(lands=lands)
        node.mover.load(load(7, loader=loader))
        node.finish_loads()
        assert node.events == [BlockArrived(0.0, 7, 5, "tiny", block) for block in ALL]
        assert node.store.resident("tiny", "host") == frozenset()

    def test_sequential_reads_everything_first(self, make: Callable[..., Node]) -> None:
        node = make()
        node.mover.load(load(7, loader="sequential"))
        node.step()  # begins the first step; running on could see its end
        (first,) = node.mover._loads._running
        first.join()
        assert node.store.resident("tiny", "host") == set(ALL)
        assert node.store.resident("tiny", "gpu") == frozenset()
        assert node.arrived == []
        node.finish_loads()
        assert node.arrived == ALL

    def test_a_cancelled_sequential_load_leaves_no_host_copy(self, make: Callable[..., Node]) -> None:
        """Cancelled between its two steps."""
        node = make()
        node.mover.load(load(7, loader="sequential"))
        node.step()  # begins the first step; running on could see its end
        (first,) = node.mover._loads._running
        first.join()
        node.mover._loads.cancel(7)
        node.finish_loads()
        assert node.arrived == []
        assert node.store.resident("tiny", "host") == frozenset()

    @pytest.mark.parametrize("loader", ["pipelined", "sequential"])
    @pytest.mark.parametrize(
        ("tier", "ways"), [("ssd", {"ssd", "pcie"}), ("host", {"pcie"}), ("remote", {"remote", "pcie"}), ("instant", set())]
    )
    def test_the_ways_of_a_tier(self, make: Callable[..., Node], tier: str, ways: set[str], loader: str) -> None:
        """Storage and PCIe at once, or one after the other; PCIe alone from host memory, as in the simulator."""
        links = {name: Counted() for name in ("ssd", "pcie", "remote")}
        node = make(links=Links(**links), held="host" if tier == "host" else "")
        node.mover.load(load(7, tier, loader))
        node.finish_loads()
        assert node.arrived == ALL
        assert {name for name, bucket in links.items() if bucket.passed} == ways
        for way in ways:
            assert links[way].passed == sum(node.model.block_bytes)
            assert (set(links[way].queues), links[way]._queued) == ({1}, 0), "it is busy between blocks, not afterwards"

    def test_a_cluster_without_a_remote_store(self, make: Callable[..., Node]) -> None:
        node = make()
        node.mover.load(load(7, "remote"))
        node.finish_loads()
        (failed,) = node.failed
        assert (failed.command, failed.transfer_id) == ("LoadBlocks", 7)
        assert "remote_bytes_per_s is 0" in failed.reason
        assert node.arrived == []

    def test_a_host_copy_that_is_not_there(self, make: Callable[..., Node]) -> None:
        node = make()
        node.mover.load(load(7, "host"))
        node.finish_loads()
        assert [failed.transfer_id for failed in node.failed] == [7]
        assert "no host copy" in node.failed[0].reason

    def test_a_load_waits_for_the_host_copy_that_is_being_made(self, make: Callable[..., Node]) -> None:
        node, placed = make(), list[str]()
        node.mover.place_copy("tiny", lambda: placed.append("tiny"))
        node.mover.load(load(7, "host"))
        node.run()
        assert not node.failed
        node.finish_loads()
        assert placed == ["tiny"]
        assert node.arrived == ALL

    def test_a_damaged_shard(self, make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
        node = make()
        monkeypatch.setattr(node.store.reader, "open", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        node.mover.load(load(7))
        node.finish_loads()
        assert [failed.transfer_id for failed in node.failed] == [7]

    def test_a_command_waits_for_the_end_of_a_cancelled_load(self, make: Callable[..., Node], network: Network) -> None:
        """The block under way still lands: no multicast may find half of it."""
        source, node = make(0, held="gpu"), make(5)
        node.mover.load(load(7))
        node.run()
        node.mover.cancel(7)
        for each in (source, node):
            each.mover.multicast(multicast(8, chain(0, 5)))
        network.settle()
        node.finish_loads()
        network.run()
        assert sorted(node.arrived) == ALL
        assert not node.failed

    def test_a_cancelled_command_that_waited(self, make: Callable[..., Node]) -> None:
        node = make()
        node.mover.place_copy("tiny", lambda: None)
        node.mover.load(load(7))
        node.mover.cancel(7)
        node.finish_loads()
        assert node.arrived == []


class TestRelease:
    @pytest.mark.parametrize("lands", ["gpu", "host"])
    @pytest.mark.parametrize("keep_host", [True, False])
    def test_what_stays(self, make: Callable[..., Node], lands: str, keep_host: bool) -> None:
        node = make(lands=lands, held="gpu")
        release(node, keep_host)
        node.run()
        assert node.store.resident("tiny", "gpu") == frozenset()
        assert node.store.resident("tiny", "host") == (set(ALL) if keep_host else frozenset())

    @pytest.mark.parametrize("lands", ["gpu", "host"])
    def test_host_memory_that_blocks_came_through(self, make: Callable[..., Node], lands: str) -> None:
        """The memory is freed with the device; a host copy that was made on purpose is not."""
        node = make(lands=lands, held="gpu")
        node.store.mirror("tiny")
        release(node)
        node.run()
        assert node.store.resident("tiny", "host") == (frozenset() if lands == "host" else set(ALL))

    def test_only_when_what_used_it_has_stopped(self, make: Callable[..., Node]) -> None:
        """Other jobs go on meanwhile."""
        node, after = make(held="gpu"), Future[None]()
        release(node, after=after)
        node.mover.lost(9)
        node.run()
        assert len(node.thread) == 0
        assert node.store.resident("tiny", "gpu") == set(ALL)
        after.set_result(None)
        node.run()
        assert node.store.resident("tiny", "gpu") == frozenset()

    @pytest.mark.parametrize("next_command", ["load", "multicast"])
    def test_what_a_later_command_brings_is_not_evicted(
        self, make: Callable[..., Node], network: Network, next_command: str
    ) -> None:
        """The eviction is still being tried when the next command comes: that waits, and every block is reported again."""
        source, node = make(0, held="gpu"), make(5)
        node.mover.load(load(6))
        node.finish_loads()
        with node.store.using("tiny", [3]):
            release(node)
            node.run()
            if next_command == "load":
                node.mover.load(load(7))
            else:
                for each in (source, node):
                    each.mover.multicast(multicast(7, chain(0, 5)))
            network.run()
            node.expire()
            assert node.arrived == ALL, "nothing new yet"
        node.expire()
        network.run()
        node.finish_loads()
        node.expire()
        assert node.arrived == ALL + ALL
        assert node.store.resident("tiny", "gpu") == set(ALL)
        assert not node.failed

    def test_a_block_that_is_being_received_does_not_stay(self, make: Callable[..., Node], network: Network) -> None:
        """A cancelled multicast's last write arrives after the release was commanded."""
        source, node = make(0, held="gpu"), make(5)
        before = node.store.free_bytes("gpu")
        for each in (source, node):
            each.mover.multicast(multicast(1, chain(0, 5)))
        network.settle()
        node.mover.cancel(1)
        source.mover.cancel(1)
        release(node)
        network.settle()
        network.run()
        assert node.store.free_bytes("gpu") == before

    def test_no_room_for_the_copy_to_keep(self, make: Callable[..., Node]) -> None:
        """The device is freed all the same, and the failure names the model."""
        node = make(held="gpu")
        for block in ALL:
            node.store._tiers["host"].take(node.model, ("other", block))
        release(node, keep_host=True)
        node.run()
        assert [(failed.command, failed.model) for failed in node.failed] == [("ReleaseNode", "tiny")]
        assert node.store.resident("tiny", "gpu") == frozenset()

    def test_a_copy_is_made_beside_the_turns(self, make: Callable[..., Node]) -> None:
        """A load from it that comes meanwhile waits."""
        node = make(held="gpu")
        release(node, keep_host=True)
        node.mover.load(load(7, "host"))
        node.thread.run()
        assert node.store.resident("tiny", "host") == frozenset(), "the mover's thread copies nothing"
        node.finish_loads()
        assert node.arrived == ALL

    def test_preloaded_models_stay(self, make: Callable[..., Node]) -> None:
        node = make(held="gpu", preloaded=True)
        release(node)
        node.mover.load(load(7, "instant"))
        node.finish_loads()
        assert node.arrived == ALL

    def test_an_eviction_that_is_never_possible(self, make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
        """The eviction is given up with a failure that names the model, and later commands go on."""
        monkeypatch.setattr("lambdascale.live.node.loads._RETRIES", 2)
        node = make(held="gpu")
        with node.store.using("tiny", [3]):
            node.mover.evict(EvictBlocks(5, "tiny", "gpu"))
            node.mover.load(load(7))
            node.run()
            node.expire(), node.expire()
            assert [(failed.command, failed.model) for failed in node.failed] == [("EvictBlocks", "tiny")]
            assert not node.timers
            node.finish_loads()
        assert node.arrived == ALL


class TestReports:
    def test_a_block_is_told_of_once_until_its_model_leaves(self) -> None:
        events = list[BlockArrived | CommandFailed]()
        reports = Reports(5, events.append, lambda reason: None)
        for number in (1, 2):
            reports.arrived(number, "m", 3)
        reports.arrived(2, "other", 3)
        reports.forget("m")
        reports.arrived(4, "m", 3)
        assert [event.transfer_id for event in events if isinstance(event, BlockArrived)] == [1, 2, 4]


class TestOrder:
    def test_of_models_apart(self) -> None:
        done, order = list[str](), Order(lambda about, error: None)
        order.hold("a")
        for model in ("a", "b", "a"):
            order.submit(model, About("x"), lambda model=model: done.append(model))
        assert done == ["b"]
        order.let_go("a")
        assert done == ["b", "a", "a"]

    def test_a_command_that_holds_its_model(self) -> None:
        done, order = list[int](), Order(lambda about, error: None)
        order.submit("a", About("x"), lambda: order.hold("a"))
        order.submit("a", About("x"), lambda: done.append(1))
        assert done == []
        order.let_go("a")
        assert done == [1]

    def test_a_failure_holds_up_nobody(self) -> None:
        failed, done = list[tuple[About, str]](), list[int]()
        order = Order(lambda about, error: failed.append((about, str(error))))
        order.hold("a")
        order.submit("a", About("x", 3), lambda: [][0])
        order.submit("a", About("x", 4), lambda: done.append(1))
        order.let_go("a")
        assert (failed, done) == ([(About("x", 3), "list index out of range")], [1])

    def test_nothing_is_kept_of_what_is_done(self) -> None:
        order = Order(lambda about, error: None)
        for number in range(10):
            order.hold(str(number))
            order.submit(str(number), About("x", number), lambda: None)
            order.let_go(str(number))
        assert not order._queues
        assert not order._held
