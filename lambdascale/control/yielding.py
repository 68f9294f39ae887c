"""Replicas that give way: a request that nothing else can serve takes the place of replicas of idle models."""

from __future__ import annotations

from lambdascale.control.allocations import Allocations
from lambdascale.control.serving import Serving
from lambdascale.control.state import Allocation, Fleet, Instance, ModelState
from lambdascale.core import NodeId
from lambdascale.core.commands import StopInstance


class Yielding:
    """Releases replicas of idle models, also those that are to be kept at least: otherwise such a request would wait for ever."""

    def __init__(self, fleet: Fleet, allocations: Allocations, serving: Serving) -> None:
        self._fleet = fleet
        self._allocations = allocations
        self._serving = serving

    def make_place(self, state: ModelState) -> None:
        """Free a node for the head of the queue if neither a free node nor one of the model's own can serve it.

        The node is the one on which fewest replicas give way. Nothing happens while no node has enough of them.
        """
        fleet = self._fleet
        room = fleet.lacking(state)
        if not state.queue or (state.allocations and not room) or fleet.free_nodes(state):
            return
        nodes = (n for n in fleet.candidates(state) if n not in state.allocations and state.kv_tokens[n] >= room)
        ways = [way for node in nodes if (way := self._idle(node, state.spec.gpus_per_replica))]
        for other, allocation, instance in min(ways, key=len, default=[]):
            fleet.out.append(StopInstance(instance.instance_id))
            self._serving.drop(other, instance)
            self._allocations.release(other, allocation)

    def _idle(self, node: NodeId, gpus: int) -> list[tuple[ModelState, Allocation, Instance]]:
        """Return replicas of idle models on a node without which ``gpus`` GPUs are free there; none if they are too few."""
        free, found = self._fleet.gpus_free[node], []
        for other in self._fleet.models.values():
            allocation = other.allocations.get(node)
            if free >= gpus or allocation is None or allocation.transfers or len(allocation.instances) != 1:
                continue
            (instance,) = allocation.instances.values()
            if not instance.is_pipeline and not other.running and not other.queue:
                found.append((other, allocation, instance))
                free += other.spec.gpus_per_replica
        return found if free >= gpus else []
