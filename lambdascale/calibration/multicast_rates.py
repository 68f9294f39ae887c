"""Repeated multicasts on a live cluster that serves no requests, and the rate of the link beneath them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lambdascale.calibration import probes
from lambdascale.checkpoints import PackedModel
from lambdascale.core import MulticastPlan
from lambdascale.core.commands import Command, LoadBlocks, ReleaseNode, SetTimer, StartMulticast
from lambdascale.core.events import BlockArrived, CommandFailed, Event, NodeJoined, NodeLost, TimerFired

_LOAD, _TIMER = 1, 1
# Pause in which blocks of the last multicast are released, so that the nodes are idle when the next begins.
_PAUSE_S = 0.5


@dataclass
class Repeated:
    """A system that carries ``plan`` out ``repeat`` times, timed by the clock of the cluster that drives it.

    Its sources load the model first; destinations drop it after each multicast. ``seconds``: from each command until the last
    destination has reported its last block, verified. RuntimeError if a command fails or a node is lost.
    """

    model: PackedModel
    plan: MulticastPlan
    repeat: int
    seconds: list[float] = field(default_factory=list)
    _joined: int = 0
    _began: float = 0.0
    _left: set[tuple[int, int]] = field(default_factory=set)

    def on_event(self, event: Event) -> Sequence[Command]:
        """See ServingSystem."""
        if isinstance(event, CommandFailed | NodeLost):
            raise RuntimeError(f"the multicast failed: {event}")
        if isinstance(event, NodeJoined):
            self._joined += 1
            return self._loads() if self._joined == len(self.plan.members) else []
        if isinstance(event, TimerFired):
            return [self._multicast(event.at)]
        if isinstance(event, BlockArrived):
            return self._arrived(event)
        return []

    def _loads(self) -> list[Command]:
        name, sizes = self.model.name, self.model.block_bytes
        blocks = tuple(range(len(sizes)))
        self._left = {(node, block) for node in self.plan.sources for block in blocks}
        return [LoadBlocks(_LOAD + node, name, node, blocks, sizes, "ssd", "pipelined") for node in self.plan.sources]

    def _multicast(self, at: float) -> Command:
        self._began = at
        self._left = {(node, block) for node in self.plan.destinations for block in range(len(self.model.blocks))}
        tiers: Any = ("gpu",) * len(self.plan.sources)
        number = _LOAD + len(self.plan.members) + len(self.seconds)
        return StartMulticast(number, self.model.name, self.plan, self.model.block_bytes, tiers, "one_sided")

    def _arrived(self, event: BlockArrived) -> list[Command]:
        if (event.node, event.block) not in self._left:
            return []
        self._left.discard((event.node, event.block))
        if self._left:
            return []
        if not self._began:  # the sources have loaded
            return [SetTimer(_TIMER, event.at + _PAUSE_S)]
        self.seconds.append(event.at - self._began)
        if len(self.seconds) == self.repeat:
            return []
        releases: list[Command] = [ReleaseNode(node, self.model.name, 1, False) for node in self.plan.destinations]
        return [*releases, SetTimer(_TIMER, event.at + _PAUSE_S)]


def planned_s(plan: MulticastPlan, block_bytes: Sequence[int], bytes_per_s: float) -> float:
    """Return the seconds of a plan's rounds over links of this rate, each as long as its largest block takes."""
    return sum(max(block_bytes[send.block] for send in sends) for sends in plan.rounds) / bytes_per_s


def link_rate(transport: str, size_bytes: int = 1 << 30) -> float | None:
    """Measure the rate in bytes/s of the link under a transport, now; None if one host cannot measure it.

    cuda_ipc: a copy from GPU 0 to GPU 1, or within GPU 0 if it is the only one. shm: a copy in host memory. tcp: a stream over
    the loopback interface.
    """
    if transport == "cuda_ipc":
        return _peer_copy_rate(size_bytes)
    if transport == "shm":
        return probes.copy_rate(size_bytes // 4)
    return probes.loopback(size_bytes // 4)[0] if transport == "tcp" else None


def _peer_copy_rate(size_bytes: int) -> float:
    here, there = torch.device("cuda:0"), torch.device("cuda", min(1, torch.cuda.device_count() - 1))
    source = torch.ones(size_bytes, dtype=torch.uint8, device=here)
    target = torch.empty(size_bytes, dtype=torch.uint8, device=there)
    times = []
    for _ in range(6):
        for device in (here, there):
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        for device in (here, there):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return size_bytes / sorted(times[1:])[2]
