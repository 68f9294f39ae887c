"""GPUs of nodes given to models and taken back: the one place where GPU-seconds begin and end."""

from __future__ import annotations

from collections.abc import Iterable

from lambdascale.control.state import Allocation, Fleet, ModelState
from lambdascale.core import NodeId
from lambdascale.core.commands import AllocateNode, EvictBlocks, ReleaseNode


class Allocations:
    """Allocates and releases nodes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def allocate(self, state: ModelState, node: NodeId, wanted: Iterable[int] | None = None) -> None:
        """Give the node's GPUs to the model, to hold ``wanted`` blocks (None: all)."""
        fleet, gpus = self._fleet, state.spec.gpus_per_replica
        fleet.gpus_free[node] -= gpus
        blocks = set(range(state.blocks)) if wanted is None else set(wanted)
        state.allocations[node] = Allocation(node, state.spec.name, blocks, state.blocks, began_at=fleet.at, since=fleet.last_id)
        state.spared += state.blocks - len(blocks)
        fleet.out.append(AllocateNode(node, state.spec.name, gpus))

    def release(self, state: ModelState, allocation: Allocation) -> None:
        """Free a node's GPUs; a complete model stays behind as a host copy if it fits."""
        fleet, node, name = self._fleet, allocation.node, state.spec.name
        assert not allocation.instances, f"node {node} serves"
        assert not allocation.transfers, f"node {node} takes part in a transfer"
        self.forget(state, node)
        fleet.gpus_free[node] += state.spec.gpus_per_replica
        kept = False
        if allocation.complete:
            # The room for the copy is made before the copy.
            evicted = fleet.host.put(node, name, state.spec.size_bytes, fleet.at)
            fleet.out += [EvictBlocks(node, model, "host") for model in evicted]
            kept = fleet.host.has(node, name, fleet.at)
        fleet.out.append(ReleaseNode(node, name, state.spec.gpus_per_replica, kept))

    def give_up(self, state: ModelState, node: NodeId) -> None:
        """Free a node's GPUs after a failure; nothing stays behind."""
        self.forget(state, node)
        self._fleet.gpus_free[node] += state.spec.gpus_per_replica
        self._fleet.out.append(ReleaseNode(node, state.spec.name, state.spec.gpus_per_replica))

    @staticmethod
    def widen(state: ModelState, allocation: Allocation, blocks: Iterable[int]) -> None:
        """Let a node that holds a share hold further ``blocks``."""
        more = set(blocks) - allocation.wanted
        allocation.wanted |= more
        state.spared -= len(more)

    @staticmethod
    def forget(state: ModelState, node: NodeId) -> None:
        """Drop the record of a node, and the pipelines that wait for its blocks."""
        allocation = state.allocations.pop(node)
        state.spared -= allocation.total - len(allocation.wanted)
        state.pending = [p for p in state.pending if node not in p.plan.nodes]
