"""Members of a live cluster: their processes live, they are heard of, and they reach each other."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from lambdascale.core import NodeId
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import Launcher
from lambdascale.live.controller.log import Log

LOOK_S = 1.0
_SEVERED_S = 1.0  # a peer that died is known to be dead by then


class Membership:
    """Looks for ended processes each second; a member that is silent for ``silence_s`` seconds is taken for dead.

    Time in which nobody looked does not count as silence: after a pause of this process, or of the machine, members are heard first.
    """

    def __init__(
        self, launcher: Launcher, hub: Hub, log: Log, silence_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._launcher = launcher
        self._hub = hub
        self._log = log
        self._silence_s = silence_s
        self._clock = clock
        self.alive: set[NodeId] = set()
        self._heard: dict[NodeId, float] = {}
        self._severed: dict[frozenset[NodeId], float] = {}  # pairs whose connection is lost, since when
        self._searched = 0.0  # when ended processes were looked for
        self._looked = clock()

    def admit(self, node: NodeId) -> None:
        """Count a node as a member from now on."""
        self.alive.add(node)
        self._heard[node] = self._clock()
        self.watch()

    def hear(self, node: NodeId) -> bool:
        """Note a sign of life. Return False if the node is not a member."""
        if node not in self.alive:
            return False
        self._heard[node] = self._clock()
        return True

    def sever(self, node: NodeId, peer: NodeId, reason: str) -> None:
        """Note that a member has lost its connection to another node."""
        pair = frozenset((node, peer))
        if pair <= self.alive and pair not in self._severed:
            self._log.say(f"node {node} has lost its connection to node {peer}: {reason}")
            self._severed[pair] = self._clock()

    def lost(self, *, ended: bool) -> dict[NodeId, str]:
        """Return the members to be taken for dead, and why. ``ended``: some process has."""
        now = self._clock()
        self._forgive_pause(now)
        searching = ended or now - self._searched >= LOOK_S
        if searching:
            self._searched = now
        found = dict.fromkeys(self._cut_off(now), "it has lost its connections to others")
        found |= {node: f"silent for {now - at:.0f} s" for node, at in self._heard.items() if now - at > self._silence_s}
        if searching:
            found |= dict.fromkeys(self._launcher.dead(), "its process has ended")
        return {node: reason for node, reason in found.items() if node in self.alive}

    def _forgive_pause(self, now: float) -> None:
        pause, self._looked = now - self._looked, now
        if pause > 2 * LOOK_S:
            self._heard = {node: at + pause for node, at in self._heard.items()}

    def _cut_off(self, now: float) -> set[NodeId]:
        """Of two members that have lost their connection, return the one that has lost more connections.

        Blocks and hidden states may take any connection, and nobody knows which end has failed: such a node is taken for dead.
        """
        self._severed = {pair: since for pair, since in self._severed.items() if pair <= self.alive}
        if not any(now - since >= _SEVERED_S for since in self._severed.values()):
            return set()
        losses = Counter(node for pair in self._severed for node in pair)
        return {max(losses, key=lambda node: (losses[node], node))}

    def remove(self, node: NodeId) -> None:
        """End a node's process if it still runs; the node is a member no more."""
        self.alive.discard(node)
        self._heard.pop(node, None)
        self._severed = {pair: since for pair, since in self._severed.items() if node not in pair}
        self._launcher.kill(node)
        self.watch()

    def watch(self) -> None:
        """Have the hub wake up when one of the processes ends."""
        self._hub.watch(set(self._launcher.sentinels()))
