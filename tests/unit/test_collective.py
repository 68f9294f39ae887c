"""A node's part in broadcasts: its memory, its losses, and its end, which is always reported."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lambdascale.core import MulticastPlan
from lambdascale.core.commands import StartMulticast
from lambdascale.core.events import SetUpDone
from lambdascale.core.plan import Send
from lambdascale.core.specs import NodeOverride
from lambdascale.live.node.collective import Collective, Outlet, paced_pieces
from lambdascale.live.wire import Rendezvous
from lambdascale.testing.pacing import Counting
from lambdascale.testing.systems import small_cluster
from tests.live.harness import listening


def test_losses_of_a_broadcast() -> None:
    """Losses of its members count while it is expected or under way."""
    collective = Collective(0, "127.0.0.1", None, None, None)
    collective.lost(1)
    meeting = collective._meeting(5)
    assert collective._losses(meeting, (0, 1, 2)) == ""
    collective.lost(7)
    collective.lost(2)
    assert collective._losses(meeting, (0, 1, 2)) == "node 2 is lost"


def test_meetings_without_a_broadcast_are_not_kept_for_ever() -> None:
    collective = Collective(0, "127.0.0.1", None, None, None)
    for number in range(1000):
        collective.rendezvous(Rendezvous(number, "host:1"))
    assert len(collective._meetings) <= 64
    assert collective._meeting(999).addresses.get_nowait() == "host:1"


@pytest.mark.parametrize("met", [False, True])
def test_a_broadcast_is_given_up_before_its_blocks_move(met: bool) -> None:
    """A root that died left the others 20 s in their set-up, and for ever where NCCL makes it: loads of the model waited."""
    told: list[tuple[int, str]] = []
    store: Any = SimpleNamespace(use_device=lambda: None)
    outlet: Any = SimpleNamespace(ended=lambda number, error: told.append((number, error)), report=told.append)
    collective = Collective(1, "127.0.0.1", store, None, outlet)
    going_on = threading.Event()

    @contextmanager
    def slow(command: StartMulticast) -> Iterator[None]:
        assert going_on.wait(60)
        yield

    if met:
        collective._communicator = slow  # a set-up that takes long
    command = StartMulticast(4, "m", MulticastPlan((0, 1), (0,), 1, ((Send(0, 1, 0),),)), (8,), ("gpu",), "collective")
    collective.start(command, "gpu")
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "collective"]
    collective.cancel(4)
    assert told == [(4, "it was cancelled during its set-up")]
    going_on.set()
    thread.join(10)
    assert not thread.is_alive()
    assert told[1:] == [(4, "the broadcast broke: it was cancelled during its set-up")]
    assert not collective._meetings


def test_a_broadcast_whose_blocks_move_goes_on() -> None:
    collective = Collective(1, "127.0.0.1", None, None, None)
    collective._meeting(4)
    with collective._begun(4):
        collective.cancel(4)
    collective.cancel(5)
    assert not collective._meeting(4).cancelled


def test_nothing_listens_beyond_the_nodes_address() -> None:
    """The rendezvous took callers at all of the machine's addresses, and so did gloo's pairs at that of its name."""
    before = listening(os.getpid())
    collective = Collective(0, "127.0.0.2", None, None, None)
    with collective._communicator(StartMulticast(4, "m", MulticastPlan((0,), (0,), 1, ()), (8,), ("gpu",), "collective")):
        new = listening(os.getpid()) - before
    assert len(new) == 2
    assert {address.partition(":")[0] for address in new} == {"0200007F"}


def test_a_reader_that_leaves_ends_its_sources_wait() -> None:
    """Gloo: the source's broadcast breaks with the reader's connection, and not when its time is up."""
    command = StartMulticast(4, "m", MulticastPlan((0, 1), (0,), 1, ((Send(0, 1, 0),),)), (8,), ("gpu",), "collective")
    reader = Collective(1, "127.0.0.1", None, None, None)
    outlet: Any = SimpleNamespace(send=lambda node, message: reader.rendezvous(message))
    source = Collective(0, "127.0.0.1", None, None, outlet)

    def read_once() -> None:
        with reader._communicator(command) as group:
            group.broadcast(torch.empty(1 << 16, dtype=torch.uint8), 0)

    reading = threading.Thread(target=read_once)
    reading.start()
    with source._communicator(command) as group:
        group.broadcast(torch.zeros(1 << 16, dtype=torch.uint8), 0)
        reading.join(60)
        with pytest.raises(RuntimeError, match=r"closed|reset"):
            group.broadcast(torch.zeros(64 << 20, dtype=torch.uint8), 0)


class TestBroadcasts:
    """One member's part, with a communicator that moves nothing."""

    def run(self, node: int, held: dict[str, set[int]], awaited: set[int], error: Exception | None = None) -> Any:
        told = SimpleNamespace(written=[], ended=[], tensors=[])
        outlet = Outlet(
            written=lambda number, block: told.written.append(block),
            ended=lambda number, reason: told.ended.append((number, reason)),
            occupy=lambda busy: None,
            send=lambda node, message: None,
            report=lambda event: told.written.append(event),
        )

        @contextmanager
        def using(model: str, blocks: list[int], tier: str) -> Iterator[list[str]]:
            yield [f"{tier} {block}" for block in blocks]

        store = SimpleNamespace(
            device=torch.device("cpu"),
            use_device=lambda: None,
            holds=lambda model, block, tier: block in held[tier],
            awaited=lambda model, block: block in awaited,
            using=using,
            landing=lambda model, block: f"landing {block}",
            model=lambda name: SimpleNamespace(block_bytes=(8, 8, 8)),
        )
        collective = Collective(node, "127.0.0.1", store, None, outlet)

        def one(root: int, group: Any, data: Any, ways: Any) -> None:
            if error is not None:
                raise error
            told.tensors.append(data)

        collective._communicator = lambda command: nullcontext()
        collective._one = one
        plan = MulticastPlan((0, 1), (0,), 3, tuple((Send(0, 1, block),) for block in range(3)))
        collective._run(StartMulticast(4, "m", plan, (8, 8, 8), ("gpu",), "collective"), "host", None)
        return told

    @pytest.mark.parametrize("root", [True, False])
    def test_a_block_takes_all_ways_of_its_root(self, root: bool) -> None:
        """Each of them has had time for all of its bytes, and for nothing at other members; all take the same pieces."""
        link, pcie = Counting(1e9), Counting(1e8)
        collective = Collective(0, "127.0.0.1", None, link, None, piece_bytes=20_000_000)
        pieces: list[int] = []
        group = SimpleNamespace(broadcast=lambda piece, rank: pieces.append((piece.numel(), rank)))
        collective._one(0 if root else 1, group, torch.empty(30_000_001, dtype=torch.uint8), [link, pcie] if root else [])
        assert [size for size, _ in pieces] == [20_000_000, 10_000_001]
        assert {rank for _, rank in pieces} == {0 if root else 1}
        assert (link.bytes, pcie.bytes) == ((30_000_001,) * 2 if root else (0, 0))
        assert link.most_at_once == pcie.most_at_once == root

    def test_members_with_different_links_take_the_same_pieces(self) -> None:
        """Each took what its own network card moves in 20 ms: gloo ends the process for a piece of another size than expected."""
        cluster = replace(small_cluster(2), overrides=(NodeOverride(nodes=(1,), nic_bytes_per_s=4e6),))
        sizes = []
        for node in (0, 1):
            link = Counting(cluster.node(node).nic_bytes_per_s * cluster.rdma_efficiency)
            collective = Collective(node, "127.0.0.1", None, link, None, piece_bytes=paced_pieces(cluster))
            pieces: list[int] = []
            group = SimpleNamespace(broadcast=lambda piece, rank, pieces=pieces: pieces.append(piece.numel()))
            collective._one(0, group, torch.empty(300_000, dtype=torch.uint8), [])
            sizes.append(pieces)
        assert sizes[0] == sizes[1]
        assert len(sizes[0]) > 1

    def test_a_destination(self) -> None:
        """A block it holds, one it waits for, and one that it has on the device only: its bytes come, and are dropped."""
        told = self.run(1, {"host": {0}}, {1})
        assert told.tensors[:2] == ["host 0", "landing 1"]
        assert told.tensors[2].numel() == 8
        assert (told.written, told.ended) == ([SetUpDone(0.0, 4, 1), 0, 1, 2], [(4, "")])

    def test_a_source_without_its_blocks(self) -> None:
        """The source broadcasts nothing instead of whatever lies in its memory."""
        told = self.run(0, {"host": {0}}, set())
        assert (told.tensors, told.written) == (["host 0"], [])
        assert told.ended == [(4, "the broadcast broke: node 0 does not hold block 1 of m, which it is to broadcast")]

    @pytest.mark.parametrize("error", [RuntimeError("a\nb"), ZeroDivisionError("a")])
    def test_every_end_is_told(self, error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
        """The end is told even after a fault of ours, which is printed."""
        told = self.run(1, {"host": {0, 1, 2}}, set(), error)
        ((number, reason),) = told.ended
        assert number == 4
        assert reason.startswith("the broadcast broke: ")
        assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)
