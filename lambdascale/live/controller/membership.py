"""Members of a live cluster: nodes whose processes live and send heartbeats."""

from __future__ import annotations

import time
from collections.abc import Callable

from lambdascale.core import NodeId
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import Launcher

LOOK_S = 1.0


class Membership:
    """Looks for ended processes each second; a member that is silent for ``silence_s`` seconds counts as lost.

    Time without a look does not count as silence: after a pause of this process, or of the machine, members are heard first.
    """

    def __init__(self, launcher: Launcher, hub: Hub, silence_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._launcher = launcher
        self._hub = hub
        self._silence_s = silence_s
        self._clock = clock
        self.alive: set[NodeId] = set()
        self._heard: dict[NodeId, float] = {}
        self._searched = 0.0  # when ended processes were looked for
        self._looked = clock()

    def admit(self, node: NodeId) -> None:
        """Count a node as a member from now on."""
        self.alive.add(node)
        self._heard[node] = self._clock()
        self.watch()

    def hear(self, node: NodeId) -> bool:
        """Record a heartbeat. Return False if the node is not a member."""
        if node not in self.alive:
            return False
        self._heard[node] = self._clock()
        return True

    def lost(self, *, ended: bool) -> dict[NodeId, str]:
        """Return the members that are lost, with reasons. ``ended``: some process has ended."""
        now = self._clock()
        self._forgive_pause(now)
        searching = ended or now - self._searched >= LOOK_S
        if searching:
            self._searched = now
        found = {node: f"silent for {now - at:.0f} s" for node, at in self._heard.items() if now - at > self._silence_s}
        if searching:
            found |= dict.fromkeys(self._launcher.dead(), "its process has ended")
        return {node: reason for node, reason in found.items() if node in self.alive}

    def _forgive_pause(self, now: float) -> None:
        pause, self._looked = now - self._looked, now
        if pause > 2 * LOOK_S:
            self._heard = {node: at + pause for node, at in self._heard.items()}

    def remove(self, node: NodeId) -> None:
        """End a node's process if it still runs; the node is a member no more."""
        self.alive.discard(node)
        self._heard.pop(node, None)
        self._launcher.kill(node)
        self.watch()

    def watch(self) -> None:
        """Have the hub wake up when one of the processes ends."""
        self._hub.watch(set(self._launcher.sentinels()))
