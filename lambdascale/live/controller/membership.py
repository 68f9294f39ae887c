"""Members of a live cluster: nodes whose processes live and send heartbeats."""

from __future__ import annotations

from collections.abc import Callable

from lambdascale.core import NodeId
from lambdascale.live.controller.attention import LOOK_S
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import Launcher


class Membership:
    """Looks for ended processes each second; a member that is silent for ``silence_s`` seconds counts as lost.

    ``clock``: AttendedTime, so that a pause of this process, or of the machine, does not count as silence.
    """

    def __init__(self, launcher: Launcher, hub: Hub, silence_s: float, clock: Callable[[], float]) -> None:
        self._launcher = launcher
        self._hub = hub
        self._silence_s = silence_s
        self._clock = clock
        self.alive: set[NodeId] = set()
        self._heard: dict[NodeId, float] = {}
        self._searched = 0.0  # when ended processes were looked for

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
        searching = ended or now - self._searched >= LOOK_S
        if searching:
            self._searched = now
        found = {node: f"silent for {now - at:.0f} s" for node, at in self._heard.items() if now - at > self._silence_s}
        if searching:
            found |= {node: end.reason for node, end in self._launcher.dead().items()}
        return {node: reason for node, reason in found.items() if node in self.alive}

    def remove(self, node: NodeId) -> None:
        """End a node's process if it still runs; the node is a member no more."""
        self.alive.discard(node)
        self._heard.pop(node, None)
        self._launcher.kill(node)
        self.watch()

    def watch(self) -> None:
        """Have the hub wake up when one of the processes ends."""
        self._hub.watch(set(self._launcher.sentinels()))
