"""Run in the guest: the conformance suite on real verbs, in every shape of connection; and what only verbs can get wrong."""

from __future__ import annotations

import socket

from lambdascale.testing.transports import TransportConformance
from lambdascale.transport import Endpoint, Handlers, TokenBucket
from lambdascale.transport.rdma import RdmaOptions, load

KEY = b"k" * 32
RdmaEndpoint = load()


class TestRdma(TransportConformance):
    options = RdmaOptions()

    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return RdmaEndpoint(node, handlers, KEY, options=self.options)

    def break_off(self, endpoint: Endpoint) -> None:
        assert isinstance(endpoint, RdmaEndpoint)
        for connection in list(endpoint._connections.values()):
            connection.sock.shutdown(socket.SHUT_RDWR)


class TestPaced(TestRdma):
    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return RdmaEndpoint(node, handlers, KEY, link=TokenBucket(200e6))


class TestTwoRails(TestRdma):
    options = RdmaOptions(devices=("rxe0", "rxe1"), chunk_bytes=64 << 10)


class TestShallow(TestRdma):
    options = RdmaOptions(chunk_bytes=4096, depth=2)
