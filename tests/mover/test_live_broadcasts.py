"""Broadcasts of a collective, one job at a time, with real stores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lambdascale.live.node.loads import Links
from lambdascale.live.node.sending import BLOCK_BITS
from lambdascale.transport import TokenBucket
from tests.unit.node_doubles import BLOCKS, Node, chain, multicast, start

ALL = list(range(BLOCKS))


@pytest.mark.parametrize("held", ["host", "gpu", ""])
def test_a_broadcast_to_a_node_that_holds_a_copy(make: Callable[..., Node], held: str) -> None:
    """The node takes part and reports every block, those that it holds at once."""
    node = make(1, lands="host", held=held)
    command = multicast(1, chain(0, 1), kind="collective")
    start(command, node)
    node.run()
    assert node.broadcasts == [(command, "host", None)]
    assert node.arrived == (ALL if held else [])
    if not held:
        for block in ALL:
            with node.model.path(block).open("rb") as file:
                file.seek(node.model.blocks[block].data_offset)
                landing = node.store.landing("tiny", block)
                file.readinto(landing.numpy().data)
            node.mover.written(1, 1 << BLOCK_BITS | block)
        node.mover.broadcast_ended(1, "")
        node.run()
        assert node.arrived == ALL
    assert not node.mover._multicasts.receiving.is_receiving("tiny")


def test_a_source_of_a_broadcast_copies_its_blocks_to_where_they_are_sent_from(make: Callable[..., Node]) -> None:
    node = make(0, lands="host", held="gpu")
    start(multicast(1, chain(0, 1), kind="collective"), node)
    node.thread.run()
    assert node.broadcasts == []
    node.run()
    assert node.store.resident("tiny", "host") == set(ALL)
    assert [tier for _, tier, _ in node.broadcasts] == ["host"]


@pytest.mark.parametrize(("number", "tier", "paced"), [(0, "host", True), (0, "gpu", False), (1, "host", False)])
def test_a_broadcast_from_a_host_copy_is_paced_by_pcie(make: Callable[..., Node], number: int, tier: str, paced: bool) -> None:
    """A source that has its blocks in host memory takes PCIe beside its link; others and destinations do not."""
    pcie = TokenBucket(1e9)
    node = make(number, lands="gpu", held="" if number else tier, links=Links(pcie=pcie))
    start(multicast(1, chain(0, 1), tier=tier, kind="collective"), node)
    node.run()
    assert [over for *_, over in node.broadcasts] == [pcie if paced else None]


def test_a_broken_broadcast(make: Callable[..., Node]) -> None:
    """Told once, and not for one that was called off; its memory is free."""
    node = make(1)
    before = node.store.free_bytes("gpu")
    for number, cancelled in ((1, False), (2, True)):
        start(multicast(number, chain(0, 1), kind="collective"), node)
        if cancelled:
            node.mover.cancel(number)
        node.mover.broadcast_ended(number, "the broadcast broke")
    node.run()
    assert [(failed.transfer_id, failed.reason) for failed in node.failed] == [(1, "the broadcast broke")]
    assert node.store.free_bytes("gpu") == before
