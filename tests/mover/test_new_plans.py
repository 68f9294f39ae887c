"""Multicasts that begin anew while senders of a cancelled one may still write to the same blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lambdascale.core.commands import LoadBlocks
from lambdascale.live.node.sending import BLOCK_BITS, FENCE
from lambdascale.live.node.window import PACED, UNPACED, Window
from tests.unit.node_doubles import BLOCKS, Network, Node, chain, multicast, start

ALL = list(range(BLOCKS))
WINDOWS = pytest.mark.parametrize("window", [PACED, UNPACED], ids=["paced", "unpaced"])


def renewed(network: Network, make: Callable[..., Node], window: Window) -> tuple[Node, Node, Node]:
    """The old source, whose first write is under way, the new one, and their receiver, which is node 1."""
    old, new, node = (make(number, held=held, window=window) for number, held in ((0, "gpu"), (2, "gpu"), (1, "")))
    start(multicast(1, chain(0, 1)), old, node)
    network.settle()
    old.mover.cancel(1), node.mover.cancel(1)
    start(multicast(2, chain(2, 1)), new, node)
    return old, new, node


def asked_anew(node: Node) -> list[bool]:
    """True for each time that the new source was asked for the first block's bytes."""
    return [ready.offset is not None for ready in node.endpoint.asked if (ready.transfer_id, ready.block) == (2, 0)]


@WINDOWS
@pytest.mark.parametrize("damage", [False, True])
def test_a_new_plan_waits_for_the_last_write_of_the_old_one(
    network: Network, make: Callable[..., Node], damage: bool, window: Window
) -> None:
    """A write that came behind the new plan's was not verified: it left a damaged block in use."""
    old, _, node = renewed(network, make, window)
    late = network.writes.popleft()
    network.run()
    network.writes.appendleft(late)
    network.deliver(damage)
    network.run()
    assert sorted(node.arrived) == ALL
    with node.store.using("tiny", [0]) as (data,):
        assert node.store.block_hash(data) == int(node.model.blocks[0].xxh3_64, 16)
    assert asked_anew(node) == [damage], "what the old plan has brought the new one need not"
    assert len(node.failed) == damage
    assert not old.mover._multicasts.sending._outgoing


@WINDOWS
def test_a_new_plan_waits_while_a_block_of_the_old_one_is_verified(
    network: Network, make: Callable[..., Node], window: Window
) -> None:
    _, _, node = renewed(network, make, window)
    network.deliver()
    node.thread.run()
    assert asked_anew(node) == []
    network.run()
    assert asked_anew(node) == [False]
    assert sorted(node.arrived) == ALL


@WINDOWS
@pytest.mark.parametrize("end", ["fence", "loss"])
def test_an_old_sender_that_writes_no_more_lets_the_new_one_write(
    network: Network, make: Callable[..., Node], end: str, window: Window
) -> None:
    _, _, node = renewed(network, make, window)
    network.writes.clear()
    network.run()
    assert asked_anew(node) == []
    if end == "fence":
        node.mover.written(0, 1 << BLOCK_BITS | FENCE)
    else:
        node.mover.lost(0)
    network.run()
    assert asked_anew(node) == [True]
    assert sorted(node.arrived) == ALL


@pytest.mark.parametrize("after", ["multicast", "load"])
def test_what_follows_a_broadcast_waits_until_it_has_been_given_up(
    network: Network, make: Callable[..., Node], after: str
) -> None:
    """A broadcast is given up at once before its blocks move: its set-up may never end."""
    source, node = make(0, held="gpu"), make(1)
    start(multicast(1, chain(0, 1), kind="collective"), node)
    node.run()
    node.mover.cancel(1)
    if after == "load":
        node.mover.load(LoadBlocks(2, "tiny", 1, tuple(ALL), (1,) * BLOCKS, "ssd", "pipelined"))
    else:
        start(multicast(2, chain(0, 1)), source, node)
    network.run()
    assert node.arrived == []
    assert node.collective.cancelled == [1]
    node.mover.broadcast_ended(1, "it was cancelled")
    network.run()
    node.finish_loads()
    assert node.arrived == ALL
    assert node.failed == []
