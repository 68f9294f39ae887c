"""Faults that a test puts into the nodes of a live cluster: their processes start with an endpoint that misbehaves."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from lambdascale.core.commands import CancelTransfer, StartMulticast
from lambdascale.core.events import CommandFailed
from lambdascale.live import config
from lambdascale.live.controller.launch import LocalLauncher
from lambdascale.live.node import agent
from lambdascale.live.node.multicasts import BLOCK_BITS
from lambdascale.live.node_config import NodeConfig
from tests.live.harness import Outcome, of


class Fault(Protocol):
    """Put into every node's endpoint."""

    def put_into(self, endpoint: Any, node: int) -> None: ...


@dataclass(frozen=True)
class Damage:
    """A byte of a block changes on the way, in the first ``times`` writes of it by a node (None: by every node)."""

    block: int
    times: int = 1
    node: int | None = 0

    def put_into(self, endpoint: Any, node: int) -> None:
        intact, left = endpoint.write, self.times

        def write(peer: int, data: memoryview, offset: int, immediate: int) -> Future[None]:
            nonlocal left
            if data.nbytes and left and immediate % (1 << BLOCK_BITS) == self.block:
                left -= 1
                data = memoryview(bytes([data[0] ^ 1]) + bytes(data[1:]))
            future: Future[None] = intact(peer, data, offset, immediate)
            return future

        if self.node in (None, node):
            endpoint.write = write


@dataclass(frozen=True)
class Break:
    """A node's connection to a peer fails under its ``after``-th write to it, and both live on."""

    node: int
    peer: int
    after: int

    def put_into(self, endpoint: Any, node: int) -> None:
        intact, left = endpoint.write, self.after

        def write(peer: int, data: memoryview, offset: int, immediate: int) -> Future[None]:
            nonlocal left
            connection = endpoint._connections.get(peer)
            future: Future[None] = intact(peer, data, offset, immediate)
            if peer == self.peer:
                left -= 1
                if not left:
                    break_off(connection)
            return future

        if node == self.node:
            endpoint.write = write


def break_off(connection: Any) -> None:
    """A queue pair fails (rdma), or the socket ends."""
    if hasattr(connection, "lanes"):
        connection.lanes[0].fail()
    else:
        connection.sock.shutdown(socket.SHUT_RDWR)


class FaultyLauncher(LocalLauncher):
    """Its nodes have the fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault

    def start(self, configs: Sequence[NodeConfig]) -> None:
        for each in configs:
            self._processes[each.node] = self._context.Process(target=run_with, args=(self._fault, each), daemon=True)
            self._processes[each.node].start()


def run_with(fault: Fault, config: NodeConfig) -> None:
    """A node's process."""
    make = agent.make_endpoint

    def make_faulty(*arguments: Any) -> Any:
        endpoint = make(*arguments)
        fault.put_into(endpoint, config.node)
        return endpoint

    agent.make_endpoint = make_faulty
    agent.run(config)


def inject(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the live clusters of this test."""
    monkeypatch.setattr(config, "LocalLauncher", lambda: FaultyLauncher(fault))


def check_damage(outcome: Outcome, block: int) -> None:
    """The failure names the block, its transfer is called off, and another brings what is missing."""
    failed = of(outcome, CommandFailed)
    assert failed
    assert all(event.reason.startswith(f"block {block} of tiny") and "checksum" in event.reason for event in failed)
    assert {event.transfer_id for event in failed} <= {command.transfer_id for command in of(outcome, CancelTransfer)}
    first, again, *_ = of(outcome, StartMulticast)
    assert first.transfer_id == failed[0].transfer_id
    assert {t.block for sends in again.plan.rounds for t in sends} >= {block}
