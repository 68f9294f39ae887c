"""Joining of processes: each is launched, says hello, receives the directory, and connects to the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lambdascale.core import NodeId
from lambdascale.live import wire
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import End, Launcher
from lambdascale.live.node_config import NodeConfig

START_S = 120.0


@dataclass
class _Batch:
    """Processes launched together: the directory that names them is sent when none is missing any more."""

    missing: set[NodeId]
    introduced: dict[NodeId, str] = field(default_factory=dict)


@dataclass
class _Listed:
    """A node in the directory, since directory number ``since``; ``answered``: the last one by which it has connected."""

    address: str
    since: int
    answered: int = 0


class Joining:
    """Processes that come up, and the directory of those that are up. A process that does not join within 120 s has failed.

    A node has joined once all nodes of the directory that first named it have answered that one or a later one: connections
    are made by the node with the higher id, so either side may have to connect.
    """

    def __init__(self, launcher: Launcher, hub: Hub, clock: Callable[[], float] = time.monotonic) -> None:
        self._launcher = launcher
        self._hub = hub
        self._clock = clock
        self._number = 0
        self._generations: dict[NodeId, int] = {}
        self._deadlines: dict[NodeId, float] = {}  # of the nodes that have not joined yet
        self._batches: list[_Batch] = []
        self._directory: dict[NodeId, _Listed] = {}
        self._launched: dict[NodeId, float] = {}
        self.parts: dict[NodeId, dict[str, float]] = {}  # seconds of each part of the last start of each node

    @property
    def coming(self) -> Collection[NodeId]:
        """Nodes that were launched and have not joined yet."""
        return self._deadlines.keys()

    @property
    def connecting(self) -> bool:
        """True if a node in the directory has not joined yet."""
        return not self._directory.keys().isdisjoint(self._deadlines)

    def launch(self, configs: Sequence[NodeConfig]) -> None:
        """Start processes. From now on nothing is heard from earlier processes of these nodes."""
        for config in configs:
            self._generations[config.node] = config.generation
            self._launched[config.node] = self._clock()
            self._deadlines[config.node] = self._launched[config.node] + START_S
            self._hub.expect(config.node, config.generation)
        self._batches.append(_Batch({config.node for config in configs}))
        self._launcher.start(configs)

    def hello(self, node: NodeId, message: wire.Hello) -> None:
        """Note that a process is up."""
        self.parts[node] = dict(message.parts)
        for batch in self._batches:
            if node in batch.missing:
                batch.missing.discard(node)
                batch.introduced[node] = message.address
        self._introduce()

    def connected(self, node: NodeId, message: wire.Connected) -> None:
        """Note that a node has connected to all nodes with lower ids in its directory."""
        listed = self._directory.get(node)
        if listed is not None and message.number <= self._number:
            listed.answered = max(listed.answered, message.number)

    def remove(self, node: NodeId) -> None:
        """Forget a process that has ended, joined or not."""
        self._deadlines.pop(node, None)
        self._directory.pop(node, None)
        for batch in self._batches:
            batch.missing.discard(node)
            batch.introduced.pop(node, None)
        self._introduce()

    def _introduce(self) -> None:
        """Send the directory to all, if a batch is complete."""
        complete = [batch for batch in self._batches if not batch.missing]
        self._batches = [batch for batch in self._batches if batch.missing]
        new = {node: address for batch in complete for node, address in batch.introduced.items()}
        if not new:
            return
        self._directory |= {node: _Listed(address, self._number + 1) for node, address in new.items()}
        self.announce()

    def announce(self) -> int:
        """Send the directory to all nodes in it, so that they connect to those they are not connected to; return its number."""
        self._number += 1
        addresses = {node: listed.address for node, listed in self._directory.items()}
        message = wire.Directory(self._number, addresses, {node: self._generations[node] for node in addresses})
        for node in addresses:
            self._hub.send(node, message)
        return self._number

    def take_joined(self) -> list[NodeId]:
        """Return the nodes that have joined since the last time."""
        joined = [node for node in self._deadlines if node in self._directory and self._has_joined(self._directory[node].since)]
        for node in joined:
            del self._deadlines[node]
            self.parts.setdefault(node, {})["joined"] = self._clock() - self._launched[node]
        return sorted(joined)

    def _has_joined(self, number: int) -> bool:
        return all(listed.answered >= number for listed in self._directory.values() if listed.since <= number)

    def failed(self, dead: Mapping[NodeId, End]) -> dict[NodeId, End]:
        """Return the nodes that will not join, and why: their process is among the ``dead``, or takes too long."""
        now = self._clock()
        late = End(f"it did not come up within {START_S:.0f} s", ours=True)
        found = {node: late for node, at in self._deadlines.items() if now > at}
        return found | {node: end for node, end in dead.items() if node in self._deadlines}
