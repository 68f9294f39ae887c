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


@pytest.mark.parametrize(("sources", "victim"), [(1, 2), (2, 0)], ids=["a receiver", "a source"])
def test_a_node_is_killed(sources: int, victim: int) -> None:
    """Other nodes learn of the death while writes from and to the node are under way; their blocks suffice to plan the rest."""
    nodes = sources + 3
    with Carriers(make, nodes=nodes, sources=sources, blocks=BLOCKS, block_bytes=BLOCK_BYTES) as carriers:
        plan = BinomialPipeline().plan(sources=sources, destinations=3, blocks=BLOCKS)
        carriers.carry_and_kill(plan, victim=victim, after=2, at=2)
        survivors = [node for node in range(nodes) if node != victim]
        carriers.carry(plan_from_holdings(carriers.held, [node for node in survivors if node >= sources], BLOCKS))
        assert carriers.held == dict.fromkeys(survivors, ALL)
