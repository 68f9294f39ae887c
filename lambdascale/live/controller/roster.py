"""The node processes of a cluster: started, introduced to each other, watched, and started anew when they are lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import structs

from lambdascale.core import NodeId, UserError
from lambdascale.live import wire
from lambdascale.live.controller.attention import AttendedTime
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.joining import Joining
from lambdascale.live.controller.launch import End, Launcher
from lambdascale.live.controller.log import Log
from lambdascale.live.controller.membership import Membership
from lambdascale.live.controller.mending import Mending, Pair
from lambdascale.live.controller.supervisor import Supervisor
from lambdascale.live.node_config import NodeConfig

_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Changes of membership since the last look.

    ``lost``: former members, True for those that will be started again. ``given_up``: nodes that were to return and will not.
    ``mended``: members that lost their connection to each other, and have a new one.
    """

    joined: tuple[NodeId, ...]
    lost: dict[NodeId, bool] = field(default_factory=dict)
    given_up: tuple[NodeId, ...] = ()
    mended: tuple[Pair, ...] = ()


class Roster:
    """``restarts``: how often a node's process is started again within ten minutes, at most. Belongs to the control thread."""

    def __init__(
        self,
        launcher: Launcher,
        hub: Hub,
        log: Log,
        *,
        silence_s: float,
        restarts: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._launcher = launcher
        self._hub = hub
        self._log = log
        self._joining = Joining(launcher, hub, clock)
        attended = AttendedTime(clock)
        self._membership = Membership(launcher, hub, silence_s, attended)
        self._mending = Mending(
            lambda node, peer: hub.send(node, wire.Sever(peer)), self._joining.announce, clock=attended, silence_s=silence_s
        )
        self._supervisor = Supervisor(restarts, log.say, clock)
        self._configs: dict[NodeId, NodeConfig] = {}
        self._doomed: dict[NodeId, str] = {}  # to be removed at the next look, and why

    @property
    def alive(self) -> set[NodeId]:
        """The members."""
        return self._membership.alive

    @property
    def start_parts(self) -> dict[str, float]:
        """Seconds of each part of the nodes' last starts, of the slowest node each; ``joined``: from launch to membership."""
        found: dict[str, float] = {}
        for parts in self._joining.parts.values():
            for name, seconds in parts.items():
                found[name] = max(seconds, found.get(name, 0.0))
        return found

    @property
    def returning(self) -> bool:
        """True if a lost node may come back."""
        return bool(self._joining.coming) or self._supervisor.waiting

    def start(self, configs: Sequence[NodeConfig]) -> list[NodeId]:
        """Launch all nodes and wait until they are connected. RuntimeError or UserError if one does not come up."""
        self._configs = {config.node: config for config in configs}
        self._joining.launch(configs)
        while self._joining.coming:
            messages, _ = self._hub.poll(_POLL_S)
            for node, message in messages:
                self._meet(node, message)
                if node in self._doomed:
                    if isinstance(message, wire.Severed | wire.Unreached):
                        self._check_start()  # the end of another node, which this one has noticed first
                    users = isinstance(message, wire.Unreached) or (isinstance(message, wire.Fault) and message.users)
                    raise (UserError if users else RuntimeError)(f"node {node}: {self._doomed[node]}")
            if not messages:
                self._check_start()
            for node in self._joining.take_joined():
                self._membership.admit(node)
        return sorted(self.alive)

    def _check_start(self) -> None:
        """Raise if a node has ended or takes too long: UserError, or RuntimeError for what may be a fault of ours."""
        failed = self._joining.failed(self._launcher.dead())
        if failed:
            raise _start_failed(failed)

    def hear(self, node: NodeId, message: wire.ToController) -> bool:
        """Take what concerns membership; return True if the message is a member's and of another kind."""
        if node in self._joining.coming:
            self._meet(node, message)
            return False
        if not self._membership.hear(node):
            return False
        if isinstance(message, wire.Connected):
            self._joining.connected(node, message)
            self._mending.connected(node, message.number)
        elif isinstance(message, wire.Severed):
            self._severed(node, message)
        elif isinstance(message, wire.Unreached):
            self._unreached(node, message)
        elif isinstance(message, wire.Fault):
            self._doomed[node] = message.reason
        else:
            return not isinstance(message, wire.Beat | wire.Hello)
        return False

    def _meet(self, node: NodeId, message: wire.ToController) -> None:
        """Take a message of a node that has not joined yet."""
        if isinstance(message, wire.Hello):
            self._joining.hello(node, message)
        elif isinstance(message, wire.Connected):
            self._joining.connected(node, message)
        elif isinstance(message, wire.Fault) or (
            isinstance(message, wire.Unreached | wire.Severed)
            and (message.peer in self.alive or message.peer in self._joining.coming)
        ):
            self._doomed[node] = message.reason

    def _severed(self, node: NodeId, message: wire.Severed) -> None:
        """Note that a member has lost its connection to another node."""
        if message.peer in self.alive and message.peer != node and self._mending.severed(node, message.peer):
            self._log.say(f"node {node} has lost its connection to node {message.peer}: {message.reason}")

    def _unreached(self, node: NodeId, message: wire.Unreached) -> None:
        """Note that a member cannot connect to a node. The node counts as failed if it is new, else the connection as lost."""
        if message.peer in self._joining.coming:
            self._doomed[message.peer] = f"node {node} cannot connect: {message.reason}"
        elif message.peer in self.alive and message.peer != node:
            self._log.say(f"node {node} cannot connect to node {message.peer}: {message.reason}")
            self._mending.unreached(node, message.peer)

    def doom(self, node: NodeId, reason: str) -> None:
        """Count a member as lost from the next ``look`` on."""
        self._doomed.setdefault(node, reason)

    def look(self, *, ended: bool) -> Changes:
        """Return what has changed since the last time, and restart what is due. ``ended``: a process has ended."""
        joined = self._joining.take_joined()
        for node in joined:
            self._membership.admit(node)
            self._supervisor.joined(node)
            took = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self._joining.parts[node].items())
            self._log.say(f"node {node} is back (seconds: {took})")
        doomed, self._doomed = self._doomed, {}
        coming = set(self._joining.coming)
        failed = {node: end.reason for node, end in self._joining.failed(self._launcher.dead() if coming else {}).items()}
        cut_off = dict.fromkeys(self._mending.cut_off(), "it has lost its connections to others")
        lost = cut_off | self._membership.lost(ended=ended) | failed | doomed
        members = set(self.alive)
        returns = {node: self._remove(node, lost[node]) for node in sorted(lost.keys() & (members | coming))}
        if returns and (self._joining.connecting or self._mending.trying):
            # A node stops connecting at the first one that it cannot reach: it goes on by a directory without that.
            self._joining.announce()
        self._restart()
        return Changes(
            joined=tuple(joined),
            mended=tuple(self._mending.take_mended()),
            lost={node: again for node, again in returns.items() if node in members},
            given_up=tuple(node for node, again in returns.items() if node not in members and not again),
        )

    def _remove(self, node: NodeId, reason: str) -> bool:
        """End a node's process; return True if it will be started again."""
        self._log.say(f"node {node} is lost: {reason}")
        self._joining.remove(node)
        self._mending.remove(node)
        self._membership.remove(node)
        return self._supervisor.lost(node)

    def _restart(self) -> None:
        for node in self._supervisor.take_due():
            before = self._configs[node]
            self._configs[node] = structs.replace(before, generation=before.generation + 1)
            self._log.say(f"node {node} is started again")
            self._joining.launch([self._configs[node]])
            self._membership.watch()

    def wait_s(self) -> float:
        """Seconds until the next ``look`` has something to do, infinite if nothing is planned."""
        return _POLL_S if self._joining.coming or self._mending.under_way else self._supervisor.wait_s()

    def close(self) -> None:
        """End all processes."""
        for node in self.alive:
            self._hub.send(node, wire.Shutdown())
        for node in self._joining.coming:  # it may not listen before its GPU is set up, and has nothing to put in order
            self._launcher.kill(node)
        self._launcher.close()


def _start_failed(ends: Mapping[NodeId, End]) -> Exception:
    """Return the error for nodes that ended while the cluster started: UserError, unless one had a fault of ours."""
    by_reason: dict[str, list[str]] = {}
    for node, end in sorted(ends.items()):
        by_reason.setdefault(end.reason, []).append(str(node))
    reasons = "; ".join(f"node{'s' * (len(nodes) > 1)} {', '.join(nodes)}: {reason}" for reason, nodes in by_reason.items())
    return (RuntimeError if any(end.ours for end in ends.values()) else UserError)(f"the cluster did not start: {reasons}")
