"""Parts of a TTFT: what each request waited for, from arrival to first token, by the record of a simulated or a live run.

docs/results.md defines the parts. All follow from events and commands, which both backends give alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import inf
from typing import Any, Literal

import msgspec

from lambdascale.core import NodeId
from lambdascale.core.commands import (
    AllocateNode,
    CancelTransfer,
    Command,
    LoadBlocks,
    ReleaseNode,
    Serve,
    StartMulticast,
)
from lambdascale.core.events import BlockArrived, CommandFailed, Event, NodeJoined, NodeLost, SetUpDone

Part = Literal["queue", "source_wait", "setup", "transfer", "first_iteration"]
PARTS: tuple[Part, ...] = ("queue", "source_wait", "setup", "transfer", "first_iteration")
#: From a time on, requests that wait for an instance wait for this.
Mark = tuple[float, Part]


class Dispatched(msgspec.Struct, gc=False):
    """Last dispatch of a request: when, to which instance, and when it began to wait for that (its arrival or last dispatch)."""

    at_s: float
    instance: int
    since_s: float


class _Transfer(msgspec.Struct):
    """A multicast or load under way: ``senders`` of the (node, block) pairs to come.

    ``coming``: blocks that each node has still to get, ``left``: how many it has to get or to send.
    """

    began_s: float
    model: str
    senders: dict[tuple[NodeId, int], NodeId]
    coming: Counter[NodeId]
    left: Counter[NodeId]


class _Ports(msgspec.Struct):
    """A node's transfers under way, and its last period in which it had some: as sender or receiver, of any model."""

    open: int = 0
    since_s: float = inf
    until_s: float = -inf


class _Start(msgspec.Struct):
    """A node's allocation to a model: ``marks`` in order of time, transfers under way to it, and the number of its last block."""

    began_s: float
    marks: list[Mark]
    incoming: set[int]
    last_block: int = -1


class Starts:
    """Observer of node starts. Takes every event and command, in order; divides the wait of any request up to then."""

    def __init__(self) -> None:
        self._starts: dict[tuple[NodeId, str], _Start] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._ports: dict[NodeId, _Ports] = {}
        self._instances: dict[int, Sequence[Mark]] = {}
        self._blocks = 0
        self._handlers: dict[type, Callable[[float, Any], None]] = {
            AllocateNode: self._allocated,
            StartMulticast: self._multicast,
            LoadBlocks: self._load,
            SetUpDone: self._set_up,
            BlockArrived: self._arrived,
            CancelTransfer: self._ended,
            CommandFailed: self._ended,
            ReleaseNode: self._released,
            NodeLost: self._node_lost,
            NodeJoined: self._node_lost,
            Serve: self._serve,
        }

    def take(self, at_s: float, entry: Event | Command) -> None:
        """Take note of an event or command at ``at_s`` (seconds of the run)."""
        handler = self._handlers.get(type(entry))
        if handler is not None:
            handler(at_s, entry)

    def parts(self, arrival_s: float, dispatched: Dispatched, first_token_s: float) -> Sequence[float]:
        """Divide the time from ``arrival_s`` to ``first_token_s`` of a request by what it waited for: seconds of PARTS."""
        queue_s, at_s = dispatched.since_s - arrival_s, dispatched.at_s
        marks = self._instances.get(dispatched.instance, ())
        if not marks or marks[-1][0] <= dispatched.since_s:  # the common case: the instance was complete before
            return queue_s + (at_s - dispatched.since_s), 0.0, 0.0, 0.0, first_token_s - at_s
        found: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        found["queue"], found["first_iteration"] = queue_s, first_token_s - at_s
        for part, seconds in between(marks, dispatched.since_s, at_s):
            found[part] += seconds
        return [*found.values()]

    # -- allocations -------------------------------------------------------------------------------------------------

    def _allocated(self, at_s: float, command: AllocateNode) -> None:
        self._starts[command.node, command.model] = _Start(at_s, [(at_s, "source_wait")], set())

    def _released(self, at_s: float, command: ReleaseNode) -> None:
        self._starts.pop((command.node, command.model), None)

    def _node_lost(self, at_s: float, event: NodeLost | NodeJoined) -> None:
        for key in [key for key in self._starts if key[0] == event.node]:
            del self._starts[key]
        self._ports.pop(event.node, None)

    # -- transfers ---------------------------------------------------------------------------------------------------

    def _multicast(self, at_s: float, command: StartMulticast) -> None:
        senders = {(send.dst, send.block): send.src for sends in command.plan.rounds for send in sends}
        busy = [self._ports.get(node, _Ports()) for node in command.plan.sources]
        # All sources were busy, each with what it had to send or to receive before. A plan of destinations alone, which hold the
        # model together, waits for nobody.
        since_s = max((ports.since_s for ports in busy), default=at_s)
        until_s = min((at_s if ports.open else ports.until_s for ports in busy), default=at_s)
        for node in command.plan.destinations:
            start = self._starts.get((node, command.model))
            if start is not None and since_s < until_s and len(start.marks) == 1:
                # Before its allocation; in order, as marks are.
                until_s = min(until_s, start.began_s)
                start.marks = [(since_s, "source_wait"), (until_s, "queue"), *start.marks]
        self._begin(at_s, command.transfer_id, command.model, senders)

    def _load(self, at_s: float, command: LoadBlocks) -> None:
        senders = {(command.node, block): command.node for block in command.blocks}
        self._begin(at_s, command.transfer_id, command.model, senders)

    def _begin(self, at_s: float, number: int, model: str, senders: dict[tuple[NodeId, int], NodeId]) -> None:
        coming = Counter(node for node, _ in senders)
        transfer = self._transfers[number] = _Transfer(at_s, model, senders, coming, coming + Counter(senders.values()))
        for node in transfer.left:
            ports = self._ports.setdefault(node, _Ports())
            if not ports.open:
                ports.since_s = at_s
            ports.open += 1
        for node in coming:
            start = self._starts.get((node, model))
            if start is not None:
                start.incoming.add(number)
                start.marks.append((at_s, "transfer"))

    def _set_up(self, at_s: float, event: SetUpDone) -> None:
        transfer = self._transfers.get(event.transfer_id)
        start = None if transfer is None else self._starts.get((event.node, transfer.model))
        if transfer is None or start is None:
            return
        # Only now is it known that the transfer began with a set-up.
        start.marks = [(at, "setup" if part == "transfer" and at >= transfer.began_s else part) for at, part in start.marks]
        start.marks.append((at_s, "transfer"))

    def _arrived(self, at_s: float, event: BlockArrived) -> None:
        """Count a block for all transfers that were to bring it, whichever did."""
        start = self._starts.get((event.node, event.model))
        if start is None:
            return
        self._blocks += 1
        start.last_block = self._blocks
        for number in sorted(start.incoming):
            transfer = self._transfers[number]
            sender = transfer.senders.pop((event.node, event.block), None)
            if sender is None:
                continue
            self._count(at_s, transfer, sender)
            self._count(at_s, transfer, event.node)
            transfer.coming[event.node] -= 1
            if not transfer.coming[event.node]:
                self._through(at_s, start, number, "queue")
            if not transfer.senders:
                del self._transfers[number]

    def _count(self, at_s: float, transfer: _Transfer, node: NodeId) -> None:
        transfer.left[node] -= 1
        if not transfer.left[node]:
            self._close(at_s, node)

    def _close(self, at_s: float, node: NodeId) -> None:
        ports = self._ports.get(node)
        if ports is not None and ports.open:
            ports.open -= 1
            ports.until_s = at_s

    def _ended(self, at_s: float, entry: CancelTransfer | CommandFailed) -> None:
        transfer = self._transfers.pop(entry.transfer_id, None)
        if transfer is None:
            return
        for node in +transfer.left:
            self._close(at_s, node)
        for node in +transfer.coming:
            start = self._starts.get((node, transfer.model))
            if start is not None:
                self._through(at_s, start, entry.transfer_id, "source_wait")

    @staticmethod
    def _through(at_s: float, start: _Start, number: int, then: Part) -> None:
        """Take a transfer off those on the way to a node; after the last of them its requests wait for ``then``."""
        if number in start.incoming:
            start.incoming.remove(number)
            if not start.incoming:
                start.marks.append((at_s, then))

    # -- instances ---------------------------------------------------------------------------------------------------

    def _serve(self, at_s: float, command: Serve) -> None:
        """Count the wait of an instance's requests as one for the node whose last block came last."""
        found = (self._starts.get((stage.node, command.model)) for stage in command.stages)
        last = max((start for start in found if start is not None), key=lambda start: start.last_block, default=None)
        self._instances[command.instance] = () if last is None else (*last.marks, (at_s, "queue"))


def between(marks: Sequence[Mark], begin_s: float, end_s: float) -> Iterator[tuple[Part, float]]:
    """Yield the stretches between two times with what is waited for in each: the queue before the first mark."""
    whole: Sequence[Mark] = [(-inf, "queue"), *marks, (inf, "queue")]
    for (at_s, part), (next_s, _) in pairwise(whole):
        low, high = max(at_s, begin_s), min(next_s, end_s)
        if high > low:
            yield part, high - low
