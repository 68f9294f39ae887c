"""Run in the guest: multicasts by processes, with every block's checksum verified at its destination."""

from __future__ import annotations

import pytest

from lambdascale.core import NodeId
from lambdascale.multicast import BinomialPipeline, plan_from_holdings
from lambdascale.testing.carriers import Carriers
from lambdascale.transport import Endpoint, Handlers
from lambdascale.transport.rdma import RdmaOptions, load

BLOCKS, BLOCK_BYTES = 8, 1 << 19
ALL = set(range(BLOCKS))


def make(node: NodeId, handlers: Handlers) -> Endpoint:
    return load()(node, handlers, b"k" * 32, options=RdmaOptions(chunk_bytes=1 << 17))


@pytest.mark.parametrize(("sources", "nodes"), [(1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (2, 6)])
def test_everybody_gets_everything(sources: int, nodes: int) -> None:
    with Carriers(make, nodes=nodes, sources=sources, blocks=BLOCKS, block_bytes=BLOCK_BYTES) as carriers:
        carriers.carry(BinomialPipeline().plan(sources=sources, destinations=nodes - sources, blocks=BLOCKS))
        assert carriers.held == dict.fromkeys(range(nodes), ALL)


def test_connections_are_used_again() -> None:
    """A second multicast, from another source, uses the same queue pairs."""
    with Carriers(make, nodes=3, sources=2, blocks=BLOCKS, block_bytes=BLOCK_BYTES) as carriers:
        carriers.carry(plan_from_holdings({0: {0, 1, 2}}, [2], 3))
        carriers.carry(plan_from_holdings({1: ALL, 2: {0, 1, 2}}, [2], BLOCKS))
        assert carriers.held[2] == ALL


def test_a_receiver_is_killed() -> None:
    """A receiver's death is reported to the others, and the blocks they hold suffice to plan the rest."""
    with Carriers(make, nodes=4, sources=1, blocks=BLOCKS, block_bytes=BLOCK_BYTES) as carriers:
        carriers.carry_and_kill(BinomialPipeline().plan(sources=1, destinations=3, blocks=BLOCKS), victim=2, after=2)
        carriers.carry(plan_from_holdings(carriers.held, [1, 3], BLOCKS))
        assert carriers.held == dict.fromkeys((0, 1, 3), ALL)
