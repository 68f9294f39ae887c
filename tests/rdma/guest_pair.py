"""Run in one of two guests on a cable: nodes with odd numbers are in the other guest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lambdascale.testing.transports import Node, TransportConformance
from lambdascale.transport import Endpoint, Handlers
from lambdascale.transport.rdma import load
from tests.rdma.remote import KEY, STANDING, RemoteEndpoint, break_off, reach

HERE, THERE = os.environ["GUEST_HERE"], os.environ["GUEST_THERE"]


@pytest.fixture(scope="module", autouse=True)
def other_guest() -> Iterator[None]:
    TestAcrossGuests.other = reach(THERE, 300.0)
    yield
    TestAcrossGuests.other.leave()


class TestAcrossGuests(TransportConformance):
    other: Any = None

    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        if node % 2:
            return RemoteEndpoint(self.other, node, handlers, THERE)
        return load()(node, handlers, KEY, host=HERE, options=STANDING)

    @pytest.mark.skip(reason="a bucket paces the threads of its own process, and the writing endpoint is in another guest")
    def test_a_write_takes_every_way(self, nodes: Callable[..., list[Node]]) -> None:
        pass

    def break_off(self, endpoint: Endpoint) -> None:
        endpoint.break_off() if isinstance(endpoint, RemoteEndpoint) else break_off(endpoint)
