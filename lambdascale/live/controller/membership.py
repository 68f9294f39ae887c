"""Which nodes are of a live cluster: their processes live, they are heard of, and they reach each other."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable

from lambdascale.core import NodeId
from lambdascale.live import wire
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import Launcher

PING_S = 1.0
_SEVERED_S = 1.0  # a peer that died is known to be dead by then


class Membership:
    """Asks nodes for a sign of life each second; one that gives none for ``silence_s`` seconds is taken for dead."""

    def __init__(self, launcher: Launcher, hub: Hub, silence_s: float) -> None:
        self._launcher = launcher
        self._hub = hub
        self._silence_s = silence_s
        self.alive: set[NodeId] = set()
        self._heard: dict[NodeId, float] = {}
        self._severed: dict[frozenset[NodeId], float] = {}  # pairs whose connection is gone, since when
        self._pinged = 0.0

    def begin(self, nodes: Iterable[NodeId]) -> None:
        """These are there."""
        self.alive = set(nodes)
        self._heard = dict.fromkeys(self.alive, time.monotonic())
        self._watch()

    def hear(self, node: NodeId) -> bool:
        """A message has come; False: from a node that is none of the cluster any more."""
        if node not in self.alive:
            return False
        self._heard[node] = time.monotonic()
        return True

    def sever(self, node: NodeId, message: wire.Severed) -> None:
        """A node says that it has lost its connection to another one."""
        pair = frozenset((node, message.peer))
        if pair <= self.alive and pair not in self._severed:
            print(f"node {node} has lost its connection to node {message.peer}: {message.reason}", file=sys.stderr)
            self._severed[pair] = time.monotonic()

    def gone(self, *, ended: bool) -> set[NodeId]:
        """Ping when it is time; nodes to be taken for dead. ``ended``: some process has."""
        now = time.monotonic()
        looking = ended or now - self._pinged >= PING_S
        if now - self._pinged >= PING_S:
            self._pinged = now
            for node in self.alive:
                self._hub.send(node, wire.Ping())
        dead = set(self._launcher.dead()) if looking else set()
        dead |= {node for node, heard in self._heard.items() if now - heard > self._silence_s}
        dead |= self._cut_off(now)
        return dead & self.alive

    def _cut_off(self, now: float) -> set[NodeId]:
        """A node that lives and has lost its connection to another one: of the two, the one that has lost more.

        Blocks and hidden states may take any connection, and nobody knows which end has failed: such a node is taken for dead.
        """
        self._severed = {pair: since for pair, since in self._severed.items() if pair <= self.alive}
        if not any(now - since >= _SEVERED_S for since in self._severed.values()):
            return set()
        losses = Counter(node for pair in self._severed for node in pair)
        return {max(losses, key=lambda node: (losses[node], node))}

    def remove(self, node: NodeId) -> None:
        """It is none of the cluster any more; its process is ended if it still runs."""
        self.alive.discard(node)
        self._heard.pop(node, None)
        self._launcher.kill(node)
        self._watch()

    def _watch(self) -> None:
        self._hub.watch(set(self._launcher.sentinels()))
