"""Faults that a test puts into the nodes of a live cluster: their processes start with an endpoint that misbehaves."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.synchronize import Event as Signal
from typing import Any, Protocol

import pytest

from lambdascale.core.commands import CancelTransfer, StartMulticast
from lambdascale.core.events import CommandFailed
from lambdascale.live import config, wire
from lambdascale.live.controller.backend import LiveBackend
from lambdascale.live.controller.launch import LocalLauncher
from lambdascale.live.node import agent
from lambdascale.live.node.multicasts import BLOCK_BITS
from lambdascale.live.node_config import NodeConfig
from lambdascale.transport import TokenBucket
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

        def write(peer: int, data: memoryview, offset: int, immediate: int, over: TokenBucket | None = None) -> Future[None]:
            nonlocal left
            if data.nbytes and left and immediate % (1 << BLOCK_BITS) == self.block:
                left -= 1
                data = memoryview(bytes([data[0] ^ 1]) + bytes(data[1:]))
            future: Future[None] = intact(peer, data, offset, immediate, over)
            return future

        if self.node in (None, node):
            endpoint.write = write


@dataclass(frozen=True)
class Break:
    """A node's connection to a peer fails under its ``after``-th write to it (``always``: and later ones); both live on."""

    node: int
    peer: int
    after: int
    always: bool = False

    def put_into(self, endpoint: Any, node: int) -> None:
        intact, left = endpoint.write, self.after

        def write(peer: int, data: memoryview, offset: int, immediate: int, over: TokenBucket | None = None) -> Future[None]:
            nonlocal left
            connection = endpoint._connections.get(peer)
            future: Future[None] = intact(peer, data, offset, immediate, over)
            if peer == self.peer:
                left -= 1
                if not left or (self.always and left < 0):
                    break_off(connection)
            return future

        if node == self.node:
            endpoint.write = write


@dataclass(frozen=True)
class Hold:
    """A block of each node counts as arrived there when the node's signal has been given; nothing else waits."""

    blocks: Mapping[int, int]  # by node
    signals: Mapping[int, Signal]

    @classmethod
    def back(cls, blocks: Mapping[int, int]) -> Hold:
        """Hold back these blocks, by node."""
        context = multiprocessing.get_context("forkserver")
        return cls(blocks, {node: context.Event() for node in blocks})

    def release(self, *nodes: int) -> Callable[[LiveBackend], None]:
        """Return a watcher's act that gives these nodes' signals."""

        def give(_: LiveBackend) -> None:
            for node in nodes:
                self.signals[node].set()

        return give

    def put_into(self, endpoint: Any, node: int) -> None:
        if node not in self.blocks:
            return
        signal, block = self.signals[node], self.blocks[node]

        def held(told: Callable[..., None]) -> Callable[..., None]:
            def tell(peer: int, immediate: int, *rest: int) -> None:
                if immediate % (1 << BLOCK_BITS) == block:
                    threading.Thread(target=lambda: signal.wait() and told(peer, immediate, *rest), daemon=True).start()
                else:
                    told(peer, immediate, *rest)

            return tell

        intact = endpoint.handlers
        checked = intact.on_checked and held(intact.on_checked)
        endpoint.handlers = replace(intact, on_write=held(intact.on_write), on_checked=checked)


@dataclass(frozen=True)
class Both:
    """Two faults at once."""

    first: Fault
    second: Fault

    def put_into(self, endpoint: Any, node: int) -> None:
        self.first.put_into(endpoint, node)
        self.second.put_into(endpoint, node)


@dataclass(frozen=True)
class OnlyPlaced:
    """A node ends when it sends KV in a message; ``placed`` is given when one has written KV to its place."""

    placed: Signal

    def put_into(self, endpoint: Any, node: int) -> None:
        intact = endpoint.send

        def send(peer: int, data: bytes) -> Future[None]:
            message = wire.to_peer(data)
            if isinstance(message, wire.KvPart):
                if isinstance(message.data, bytes):
                    os._exit(3)
                self.placed.set()
            future: Future[None] = intact(peer, data)
            return future

        endpoint.send = send


def break_off(connection: Any) -> None:
    """A queue pair fails (rdma), or the socket ends."""
    if hasattr(connection, "lanes"):
        connection.lanes[0].fail()
    else:
        connection.sock.shutdown(socket.SHUT_RDWR)


def run_with(fault: Fault, config: NodeConfig, launched: float) -> None:
    """Run a node with a fault: its process's main."""
    make = agent.make_endpoint

    def make_faulty(*arguments: Any) -> Any:
        endpoint = make(*arguments)
        fault.put_into(endpoint, config.node)
        return endpoint

    agent.make_endpoint = make_faulty
    agent.run(config, launched)


def inject(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject faults into the live clusters of this test."""
    monkeypatch.setattr(config, "LocalLauncher", partial(LocalLauncher, main=partial(run_with, fault)))


def check_damage(outcome: Outcome, block: int) -> None:
    """The failure names the block, its transfer is called off, and another brings what is missing."""
    failed = of(outcome, CommandFailed)
    assert failed
    assert all(event.reason.startswith(f"block {block} of tiny") and "checksum" in event.reason for event in failed)
    assert {event.transfer_id for event in failed} <= {command.transfer_id for command in of(outcome, CancelTransfer)}
    first, again, *_ = of(outcome, StartMulticast)
    assert first.transfer_id == failed[0].transfer_id
    assert {t.block for sends in again.plan.rounds for t in sends} >= {block}
