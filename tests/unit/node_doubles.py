"""Nodes without processes: movers whose threads a test steps, real stores, and an endpoint that copies when the test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lambdascale.checkpoints import PackedModel
from lambdascale.core import MulticastPlan
from lambdascale.core.commands import StartMulticast
from lambdascale.core.events import BlockArrived, CommandFailed
from lambdascale.core.plan import Send
from lambdascale.inference import BlockStore, StoreConfig
from lambdascale.live import wire
from lambdascale.live.node.loads import Links
from lambdascale.live.node.mover import Mover
from lambdascale.live.node.window import PACED
from lambdascale.testing.executors import Steps
from lambdascale.transport import TokenBucket, TransportError

BLOCKS = 8


class Network:
    """Endpoints by node. Messages arrive at once, writes when ``deliver`` is called."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.writes: deque[tuple[int, int, bytes, int, int, Future[None]]] = deque()

    def deliver(self, damage: bool = False) -> bool:
        """Let the oldest write arrive, perhaps with a byte changed; False without any."""
        if not self.writes:
            return False
        source, target, data, offset, immediate, future = self.writes.popleft()
        node = self.nodes[target]
        if data:
            landing = node.store._tiers[node.store.landing_tier].arena
            landing.view(offset, len(data)).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            if damage:
                landing.view(offset, 1)[0] ^= 1
        node.mover.written(source, immediate)
        future.set_result(None)
        return True

    def settle(self) -> None:
        """Step all nodes, delivering no write, until nothing moves."""
        while any(node.step() for node in self.nodes.values()):
            pass

    def run(self) -> None:
        """Step all nodes and deliver until nothing moves."""
        while any([self.deliver(), *(node.step() for node in self.nodes.values())]):
            pass


class FakeEndpoint:
    """One node's end of the network."""

    def __init__(self, network: Network, node: int) -> None:
        self._network, self._node = network, node
        self.admitted: list[int] = []
        self.asked: list[wire.Ready] = []
        self.lost: set[int] = set()
        self.over: list[TokenBucket | None] = []  # what paces each write beside the link

    def send(self, peer: int, data: bytes) -> None:
        self._check(peer)
        message = wire.to_peer(data)
        assert isinstance(message, wire.Ready)
        self.asked.append(message)
        if peer in self._network.nodes:
            self._network.nodes[peer].mover.ready(self._node, message)

    def write(self, peer: int, data: memoryview, offset: int, immediate: int, over: TokenBucket | None = None) -> Future[None]:
        self._check(peer)
        self.over.append(over)
        future = Future[None]()
        self._network.writes.append((self._node, peer, bytes(data), offset, immediate, future))
        return future

    def admit(self, peer: int) -> None:
        self._check(peer)
        self.admitted.append(peer)

    def dismiss(self, peer: int) -> None:
        self.admitted.remove(peer)

    def _check(self, peer: int) -> None:
        if peer in self.lost:
            raise TransportError(f"node {peer} is not connected")


class FakeBroadcasts:
    """Notes the broadcasts that a node has begun and given up."""

    def __init__(self) -> None:
        self.begun: list[tuple[StartMulticast, str, TokenBucket | None]] = []
        self.cancelled: list[int] = []

    def start(self, command: StartMulticast, tier: str, over: TokenBucket | None) -> None:
        self.begun.append((command, tier, over))

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)


class Node:
    """A mover with a real store. ``lands`` on the device, or in host memory beside it as with a GPU that no NIC writes to."""

    def __init__(self, network: Network, number: int, model: PackedModel, *, lands: str, held: str = "", **options: Any) -> None:
        size = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
        config = StoreConfig(host_bytes=size, device_bytes=size, land_on_device=lands == "gpu", readers=1)
        self.store, self.model = BlockStore(config), model
        self.store.add(model)
        if held:
            self.store.load(model.name, range(BLOCKS), to=held, keep_host=False).wait(30)
        self.thread, self.worker = Steps(), Steps()
        self.timers = deque[Callable[[], object]]()
        self.events: list[Any] = []
        self.faults: list[str] = []
        self.collective = FakeBroadcasts()
        self.endpoint = FakeEndpoint(network, number)
        self.mover = Mover(
            number,
            self.store,
            self.endpoint,
            self.events.append,
            self.faults.append,
            window=options.pop("window", PACED),
            links=options.pop("links", Links()),
            **options,
            collective=self.collective,
            thread=self.thread,
            worker=self.worker,
            timer=lambda delay_s, job: self.timers.append(job),
        )
        network.nodes[number] = self

    def step(self) -> bool:
        """Run one job of each thread; False if none waits."""
        return any([self.thread.step(), self.worker.step()])

    def run(self) -> None:
        """Run all jobs of both threads."""
        while self.step():
            pass

    def finish_loads(self) -> None:
        """Wait for the threads of loads under way, and run what they have given the node to do."""
        self.run()
        while running := list(self.mover._loads._running):
            for load in running:
                load.join()
            self.run()

    def expire(self) -> None:
        """Let all timers that are set go off."""
        timers, self.timers = self.timers, deque()
        for job in timers:
            job()
        self.run()

    @property
    def broadcasts(self) -> list[tuple[StartMulticast, str, TokenBucket | None]]:
        """Broadcasts that have begun: what is sent, from where, over what beside the link."""
        return self.collective.begun

    @property
    def arrived(self) -> list[int]:
        """Blocks in the order in which they were reported."""
        return [event.block for event in self.events if isinstance(event, BlockArrived)]

    @property
    def failed(self) -> list[CommandFailed]:
        return [event for event in self.events if isinstance(event, CommandFailed)]

    def close(self) -> None:
        self.mover.close()
        self.store.close()


def chain(*nodes: int, blocks: int = BLOCKS) -> MulticastPlan:
    """Every node sends each block to the next one."""
    rounds: list[list[Send]] = [[] for _ in range(blocks + len(nodes) - 2)]
    for hop, (src, dst) in enumerate(pairwise(nodes)):
        for block in range(blocks):
            rounds[block + hop].append(Send(src, dst, block))
    return MulticastPlan(tuple(nodes), nodes[:1], blocks, tuple(tuple(sends) for sends in rounds))


def multicast(
    number: int, plan: MulticastPlan, model: str = "tiny", tier: Any = "gpu", kind: Any = "one_sided"
) -> StartMulticast:
    return StartMulticast(number, model, plan, (1,) * plan.blocks, (tier,) * len(plan.sources), kind)


def pack_tiny(root: Path) -> PackedModel:
    """A packed model of eight blocks."""
    from lambdascale.checkpoints import pack
    from lambdascale.checkpoints.synthetic import PRESETS, write_random

    (root / "source").mkdir()
    write_random(PRESETS["tiny"], root / "source", 1)
    pack(root / "source", root / "tiny", BLOCKS)
    return PackedModel.open(root / "tiny", "tiny")


def start(command: Any, *nodes: Node) -> None:
    """Give each node the command of a multicast."""
    for node in nodes:
        node.mover.multicast(command)
