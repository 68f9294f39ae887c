"""Counts of node starts by the way in which the weights came, and the size of the largest broadcast."""

from __future__ import annotations

from collections import Counter

from lambdascale.core import MulticastPlan, NodeId
from lambdascale.core.commands import AllocateNode, LoadBlocks, StartMulticast
from lambdascale.core.events import RequestArrived
from lambdascale.metrics.recorder import Recorder


def node_starts(recorder: Recorder) -> tuple[dict[str, int], dict[str, int]]:
    """Number of allocations of a node to a model from the first request on, by the first transfer that brings the model there.

    The ways are ``own_load`` (from the node's own host memory or storage; ideal scaling, too), ``unicast`` (from a source with no
    other destination) and ``multicast``; the second result divides the last by the number of destinations of the source.
    """
    ways: Counter[str] = Counter(own_load=0, unicast=0, multicast=0)
    sizes: Counter[int] = Counter()
    waiting: set[tuple[NodeId, str]] = set()
    counts = False
    for _, entry in recorder.entries:
        if isinstance(entry, RequestArrived):
            counts = True
        elif isinstance(entry, AllocateNode) and counts:
            waiting.add((entry.node, entry.model))
        elif isinstance(entry, LoadBlocks) and (entry.node, entry.model) in waiting:
            waiting.remove((entry.node, entry.model))
            ways["own_load"] += 1
        elif isinstance(entry, StartMulticast):
            for node in entry.plan.destinations:
                if (node, entry.model) in waiting:
                    waiting.remove((node, entry.model))
                    size = _destinations_beside(entry.plan, node)
                    ways["unicast" if size == 1 else "multicast"] += 1
                    sizes[size] += size > 1
    return dict(ways), {str(size): count for size, count in sorted(sizes.items()) if size > 1}


def largest_broadcast(recorder: Recorder) -> int:
    """Ranks of the largest collective broadcast, its sources included; 0 without one."""
    broadcasts = (e for _, e in recorder.entries if isinstance(e, StartMulticast) and e.multicast == "collective")
    return max((len(entry.plan.members) for entry in broadcasts), default=0)


def _destinations_beside(plan: MulticastPlan, node: NodeId) -> int:
    """Return the number of destinations that get the model from the same source as ``node``, itself included."""
    group = next((group for group in plan.groups if node in group), None)
    return len(group) - 1 if group else -(-len(plan.destinations) // len(plan.sources))
