"""Sends of a node, one job at a time: their order, how many go at once, and the ways that pace them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lambdascale.core import MulticastPlan, UserError
from lambdascale.core.plan import Send
from lambdascale.live import wire
from lambdascale.live.node.loads import Links
from lambdascale.live.node.sending import FENCE
from lambdascale.live.node.window import PACED, UNPACED, Window
from lambdascale.transport import TokenBucket
from tests.unit.node_doubles import BLOCKS, Network, Node, chain, multicast, start

ALL = list(range(BLOCKS))


@pytest.mark.parametrize("lands", ["gpu", "host"])
@pytest.mark.parametrize("tier", ["gpu", "host"])
def test_sends_from_a_host_copy_are_paced_by_pcie(network: Network, make: Callable[..., Node], tier: str, lands: str) -> None:
    """The link alone paces a source whose GPU has the blocks, and blocks that are passed on: as in the simulator."""
    pcie = [TokenBucket(1e9) for _ in range(3)]
    nodes = [make(n, lands=lands, held="" if n else tier, links=Links(pcie=pcie[n])) for n in range(3)]
    start(multicast(1, chain(0, 1, 2), tier=tier), *nodes)
    network.run()
    assert nodes[2].arrived == ALL
    assert nodes[0].endpoint.over == [pcie[0] if tier == "host" else None] * BLOCKS
    assert nodes[1].endpoint.over == [None] * BLOCKS


@pytest.mark.parametrize(
    ("window", "sent"), [(PACED, []), (UNPACED, [(2, 0), (2, 1), (2, 2)]), (Window(peer=2), [(2, 0), (2, 1)])]
)
def test_a_receiver_that_has_not_asked(
    network: Network, make: Callable[..., Node], window: Window, sent: list[tuple[int, int]]
) -> None:
    """Others wait for it in the plan's order only; each receiver's blocks keep their order, as many at once as the window has."""
    rounds = tuple((Send(0, 1 + block % 2, block // 2),) for block in range(2 * BLOCKS))
    source = make(0, held="gpu", window=window)
    start(multicast(1, MulticastPlan((0, 1, 2), (0,), BLOCKS, rounds)), source)
    for block in (2, 0, 3, 1):
        source.mover.ready(2, wire.Ready(1, block, 0))
    source.run()
    assert [(write[1], write[4] & FENCE) for write in network.writes] == sent
    for block in ALL:
        source.mover.ready(1, wire.Ready(1, block, 0))
    source.run()
    assert [write[1] for write in network.writes].count(1) == window.peer


def test_a_window_of_nothing() -> None:
    for limits in ({"peer": 0}, {"peer": 1, "node": 0}):
        with pytest.raises(UserError, match="at least one block"):
            Window(**limits)
