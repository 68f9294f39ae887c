"""Seconds that requests were served on nodes with a part in a multicast: where its cost to other requests shows."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import inf

from lambdascale.core import NodeId
from lambdascale.core.commands import (
    CancelTransfer,
    Command,
    Dispatch,
    FailRequest,
    Repartition,
    Serve,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import BlockArrived, RequestFinished
from lambdascale.metrics.recorder import Recorder

Span = tuple[float, float]


class Covered:
    """Union of spans of time, in seconds."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._before: list[float] = []  # seconds covered before each begin
        for begin, end in sorted(spans):
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            elif end > begin:
                self._before.append(self._before[-1] + self._ends[-1] - self._begins[-1] if self._ends else 0.0)
                self._begins.append(begin)
                self._ends.append(end)

    def within(self, begin: float, end: float) -> float:
        """Return the covered seconds between two times."""
        return max(0.0, self._until(end) - self._until(begin))

    def _until(self, at: float) -> float:
        index = bisect_right(self._begins, at) - 1
        return self._before[index] + min(at, self._ends[index]) - self._begins[index] if index >= 0 else 0.0


def beside_multicasts(recorder: Recorder) -> dict[int, float]:
    """Seconds that each request was served, from dispatch to end, by an instance with a node in a multicast of any model.

    A node has a part in a multicast with its GPU's memory (a source in host memory has none), from the command to the last
    arrival, a communicator's set-up included. Requests that were never dispatched are not in the result.
    """
    commands = [entry for entry in recorder.log if isinstance(entry, Command)]
    if StartMulticast not in {*map(type, commands)}:
        return {request.request_id: 0.0 for command in commands if type(command) is Dispatch for request in command.requests}
    transfers = _multicasts(recorder)
    served = _served(recorder)
    by_node: defaultdict[NodeId, list[Span]] = defaultdict(list)
    for nodes, span in transfers:
        for node in nodes:
            by_node[node].append(span)
    covered = {instance: Covered(_meeting(spans, by_node)) for instance, spans in _instances(recorder).items()}
    nothing = Covered(())
    return {
        request: sum(covered.get(instance, nothing).within(begin, end) for instance, begin, end in stays)
        for request, stays in served.items()
    }


def _multicasts(recorder: Recorder) -> list[tuple[tuple[NodeId, ...], Span]]:
    """Nodes and span of each multicast."""
    nodes: dict[int, tuple[NodeId, ...]] = {}
    spans: dict[int, Span] = {}
    open_: set[int] = set()
    for at, entry in recorder.entries:
        if type(entry) is BlockArrived:
            if entry.transfer_id in open_:
                spans[entry.transfer_id] = spans[entry.transfer_id][0], at
        elif type(entry) is StartMulticast:
            plan = entry.plan
            tiers = dict(zip(plan.sources, entry.source_tiers, strict=True))
            nodes[entry.transfer_id] = tuple(node for node in plan.members if tiers.get(node) != "host")
            spans[entry.transfer_id] = at, at
            open_.add(entry.transfer_id)
        elif type(entry) is CancelTransfer and entry.transfer_id in open_:
            open_.remove(entry.transfer_id)
            spans[entry.transfer_id] = spans[entry.transfer_id][0], at
    return [(nodes[number], spans[number]) for number in nodes]


def _instances(recorder: Recorder) -> dict[int, list[tuple[frozenset[NodeId], Span]]]:
    """Nodes of each instance over time."""
    found: dict[int, list[tuple[frozenset[NodeId], Span]]] = {}
    for at, entry in recorder.entries:
        if type(entry) is Serve or type(entry) is Repartition:
            spans = found.setdefault(entry.instance, [])
            if spans:
                spans[-1] = spans[-1][0], (spans[-1][1][0], at)
            spans.append((frozenset(stage.node for stage in entry.stages), (at, inf)))
    return found


def _meeting(spans: Sequence[tuple[frozenset[NodeId], Span]], by_node: dict[NodeId, list[Span]]) -> list[Span]:
    """Spans in which a node of an instance has a part in a multicast."""
    return [
        (max(begin, first), min(end, last))
        for nodes, (begin, end) in spans
        for node in nodes
        for first, last in by_node.get(node, ())
        if first < end and begin < last
    ]


def _served(recorder: Recorder) -> dict[int, list[tuple[int, float, float]]]:
    """Stays of each request: instance, begin and end."""
    stays: dict[int, list[tuple[int, float, float]]] = {}
    present: dict[int, tuple[int, float]] = {}

    def leave(request: int, at: float) -> None:
        if request in present:
            stays[request].append((*present.pop(request), at))

    def enter(request: int, instance: int, at: float) -> None:
        leave(request, at)
        stays.setdefault(request, [])
        present[request] = instance, at

    for at, entry in recorder.entries:
        if type(entry) is RequestFinished or type(entry) is FailRequest:
            leave(entry.request_id, at)
        elif type(entry) is Dispatch:
            for request in entry.requests:
                enter(request.request_id, entry.instance, at)
        elif type(entry) is SwitchMode:
            for number, instance in entry.moves:
                enter(number, instance, at)
        elif type(entry) is StopInstance:
            for number in [number for number, (instance, _) in present.items() if instance == entry.instance]:
                leave(number, at)
    return stays
