"""Multicasts by processes over the transports that do not need devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lambdascale.core import NodeId
from lambdascale.multicast import BinomialPipeline, plan_from_holdings
from lambdascale.testing.carriers import Carriers
from lambdascale.transport import Endpoint, Handlers, ShmEndpoint, TcpEndpoint

KEY = b"k" * 32
BLOCKS = 6


def tcp(node: NodeId, handlers: Handlers) -> Endpoint:
    return TcpEndpoint(node, handlers, KEY)


def shm(node: NodeId, handlers: Handlers) -> Endpoint:
    return ShmEndpoint(node, handlers, KEY)


@pytest.mark.parametrize("make", [tcp, shm])
def test_everybody_gets_everything(make: Callable[[NodeId, Handlers], Endpoint]) -> None:
    with Carriers(make, nodes=4, sources=1, blocks=BLOCKS, block_bytes=1 << 16) as carriers:
        carriers.carry(BinomialPipeline().plan(sources=1, destinations=3, blocks=BLOCKS))
        assert all(held == set(range(BLOCKS)) for held in carriers.held.values())


def test_the_survivors_of_a_killed_receiver() -> None:
    with Carriers(tcp, nodes=4, sources=1, blocks=BLOCKS, block_bytes=1 << 20) as carriers:
        carriers.carry_and_kill(BinomialPipeline().plan(sources=1, destinations=3, blocks=BLOCKS), victim=2, after=2, at=2)
        assert set(carriers.held) == {0, 1, 3}
        carriers.carry(plan_from_holdings(carriers.held, [1, 3], BLOCKS))
        assert all(held == set(range(BLOCKS)) for held in carriers.held.values())
