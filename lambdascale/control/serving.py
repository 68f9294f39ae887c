"""Instances from their first block to their end: pipelines that serve while blocks arrive, mode switches, moved boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lambdascale.control.allocations import Allocations
from lambdascale.control.router import Router
from lambdascale.control.start import Change, GradualStart, Reshape, StartPolicy
from lambdascale.control.state import Allocation, Fleet, Instance, ModelState, PendingPipeline
from lambdascale.control.transfers import Transfers
from lambdascale.core import NodeId, PipelinePlan, Stage
from lambdascale.core.commands import KvPolicy, Repartition, Serve, StopInstance, SwitchMode
from lambdascale.pipelines import spread_requests


class Serving:
    """Forms, reshapes and dissolves instances as blocks arrive. ``max_batch``: requests of an instance per node it has."""

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        transfers: Transfers,
        allocations: Allocations,
        *,
        start: StartPolicy,
        max_batch: int,
        kv: KvPolicy,
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._transfers = transfers
        self._allocations = allocations
        self._gradual = start if isinstance(start, GradualStart) else None
        self._max_batch = max_batch
        self._kv = kv

    def expect(self, state: ModelState, pipelines: Sequence[PipelinePlan]) -> None:
        """Form these pipelines once their nodes hold the blocks of their stages."""
        for plan in pipelines:
            needed = {(s.node, block) for s in plan.stages for block in range(s.first_block, s.last_block + 1)}
            held = {(node, block) for node, block in needed if block in state.allocations[node].blocks}
            state.pending.append(PendingPipeline(plan, needed - held))

    def block_arrived(self, state: ModelState, node: NodeId, block: int) -> None:
        """Note a block; form a pipeline or start serving alone when that was the last one missing."""
        allocation = state.allocations.get(node)
        if allocation is None or block in allocation.blocks:
            return
        allocation.blocks.add(block)
        self._transfers.block_arrived(allocation, block)
        if allocation.complete:
            self._node_complete(state, allocation)
        else:
            for pending in state.pending:
                pending.missing.discard((node, block))
            for pending in [p for p in state.pending if not p.missing]:
                self._form(state, pending)
        if self._gradual is not None:
            for change in self._gradual.advance(self._fleet, state, allocation):
                self._apply(state, change)

    def _apply(self, state: ModelState, change: Change) -> None:
        if isinstance(change, Reshape):
            self._reshape(state, state.instances[change.instance], change)
            return
        allocation = state.allocations[change.node]
        self._allocations.widen(state, allocation, change.blocks)
        self._transfers.load(state, change.node, change.tier, change.blocks)

    # -- instances ---------------------------------------------------------------------------------------------------

    def _form(self, state: ModelState, pending: PendingPipeline) -> None:
        state.pending.remove(pending)
        self._serve(state, pending.plan.stages)
        self._router.fill(state)

    def _node_complete(self, state: ModelState, allocation: Allocation) -> None:
        # A pipeline that is not ready by the time one of its nodes can serve alone has come too late.
        state.pending = [p for p in state.pending if allocation.node not in p.plan.nodes]
        if not allocation.instances:
            self._serve_alone(state, allocation)
            self._router.fill(state)
            return
        for instance in list(allocation.instances.values()):
            if instance.is_pipeline and all(state.allocations[node].complete for node in instance.nodes):
                self._switch_mode(state, instance)

    def _serve_alone(self, state: ModelState, allocation: Allocation) -> Instance:
        return self._serve(state, (Stage(allocation.node, 0, state.blocks - 1),))

    def _serve(self, state: ModelState, stages: tuple[Stage, ...]) -> Instance:
        """Start an instance. It keeps as many batches in flight as it has nodes (reference, section 2.4)."""
        fleet, name = self._fleet, state.spec.name
        instance = Instance(fleet.new_id(), name, stages, fleet.at)
        self._set_stages(state, instance, stages)
        fleet.instances[instance.instance_id] = state.instances[instance.instance_id] = instance
        fleet.out.append(Serve(instance.instance_id, name, stages, state.block_bytes, instance.kv_tokens))
        return instance

    def _set_stages(self, state: ModelState, instance: Instance, stages: tuple[Stage, ...]) -> None:
        for node in instance.nodes:
            state.allocations[node].instances.pop(instance.instance_id, None)
        instance.stages = stages
        instance.capacity = len(instance.nodes) * self._max_batch
        instance.kv_tokens = self._kv_tokens(state, stages)
        for node in instance.nodes:
            state.allocations[node].instances[instance.instance_id] = instance

    @staticmethod
    def _kv_tokens(state: ModelState, stages: Sequence[Stage]) -> int:
        """KV memory of an instance: the least of its nodes'."""
        return min(state.kv_tokens[stage.node] for stage in stages)

    def _reshape(self, state: ModelState, instance: Instance, change: Reshape) -> None:
        """Move an instance to other stages; requests that may need more KV memory than those have are restarted elsewhere."""
        room = self._kv_tokens(state, change.stages)
        if all(request.kv_tokens <= room for request in instance.outstanding.values()):
            self._set_stages(state, instance, change.stages)
            self._fleet.out.append(Repartition(instance.instance_id, change.stages, self._kv, room))
        else:
            self._fleet.out.append(StopInstance(instance.instance_id))
            self.drop(state, instance)
            self._router.requeue(state, instance)
            self._serve(state, change.stages)
        for node in change.release:
            allocation = state.allocations[node]
            if not allocation.instances and not allocation.transfers:
                self._allocations.release(state, allocation)
        self._router.fill(state)

    def _switch_mode(self, state: ModelState, pipeline: Instance) -> None:
        """All nodes of a pipeline are complete: each serves alone and takes its share of the running requests (paper, 4.4)."""
        self.drop(state, pipeline)
        replicas = {i.instance_id: i for i in (self._replica_on(state, state.allocations[n]) for n in pipeline.nodes)}
        loads = {number: len(replica.outstanding) for number, replica in replicas.items()}
        moves = spread_requests(list(pipeline.outstanding), list(replicas), loads)
        for request_id, instance_id in moves:
            replicas[instance_id].outstanding[request_id] = pipeline.outstanding[request_id]
            self._fleet.moved[request_id] = instance_id
        self._fleet.out.append(SwitchMode(pipeline.instance_id, moves, self._kv))
        self._router.fill(state)

    def _replica_on(self, state: ModelState, allocation: Allocation) -> Instance:
        """Return the replica that serves on a complete node, or a new one."""
        replicas = (instance for instance in allocation.instances.values() if not instance.is_pipeline)
        return next(replicas, None) or self._serve_alone(state, allocation)

    def serve_alone(self, state: ModelState, nodes: Iterable[NodeId]) -> None:
        """Start replicas on those of ``nodes`` that hold the whole model and serve nothing."""
        for node in nodes:
            allocation = state.allocations.get(node)
            if allocation is not None and allocation.complete and not allocation.instances:
                self._serve_alone(state, allocation)

    def drop(self, state: ModelState, instance: Instance) -> None:
        """Forget an instance; the caller takes care of its outstanding requests."""
        del self._fleet.instances[instance.instance_id], state.instances[instance.instance_id]
        for node in instance.nodes:
            if node in state.allocations:
                state.allocations[node].instances.pop(instance.instance_id, None)
