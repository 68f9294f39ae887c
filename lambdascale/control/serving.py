"""Instances from their first block to their end: pipelines that serve while blocks arrive, mode switches, moved boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from lambdascale.control.allocations import Allocations
from lambdascale.control.batching import BatchLimits
from lambdascale.control.kv_choice import KvChoice, KvRule
from lambdascale.control.prospects import costs_now, left_s
from lambdascale.control.router import Router
from lambdascale.control.start import Change, GradualStart, Reshape, StartPolicy
from lambdascale.control.state import Allocation, Fleet, Instance, ModelState, PendingPipeline
from lambdascale.control.transfers import Transfers
from lambdascale.core import NodeId, PipelinePlan, Stage, SwitchRule
from lambdascale.core.commands import Repartition, Serve, StopInstance, SwitchMode
from lambdascale.core.events import BlockArrived
from lambdascale.pipelines import divide, spread_requests


class Serving:
    """Forms, reshapes and dissolves instances as blocks arrive. ``batching`` bounds the requests of an instance."""

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        transfers: Transfers,
        allocations: Allocations,
        *,
        start: StartPolicy,
        batching: BatchLimits,
        kv: KvRule,
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._transfers = transfers
        self._allocations = allocations
        # By its one method: isinstance would look at all members of the protocol, for as long as 20 events take.
        self._gradual = cast(GradualStart, start) if hasattr(start, "advance") else None
        self._batching = batching
        self._kv = KvChoice(fleet, kv, batching)

    def expect(self, state: ModelState, pipelines: Sequence[PipelinePlan]) -> None:
        """Form these pipelines once their nodes hold the blocks of their stages."""
        for plan in pipelines:
            needed = {(s.node, block) for s in plan.stages for block in range(s.first_block, s.last_block + 1)}
            held = {(node, block) for node, block in needed if block in state.allocations[node].blocks}
            state.pending.append(PendingPipeline(plan, needed - held))

    def block_arrived(self, event: BlockArrived) -> None:
        """Note a block; form a pipeline or start serving alone when that was the last one missing.

        News of a transfer that is older than the allocation is late: the node has released the block since.
        """
        state, node, block = self._fleet.models[event.model], event.node, event.block
        allocation = state.allocations.get(node)
        if allocation is None:
            return
        held = allocation.blocks
        if block in held or event.transfer_id <= allocation.since:
            return
        if not held:
            allocation.first_at = self._fleet.at
        held.add(block)
        if allocation.incoming:
            self._transfers.block_arrived(allocation, block, state.block_bytes[block])
        complete = len(held) == allocation.total
        if complete:
            self._node_complete(state, allocation)
        elif state.pending:
            self._advance(state, node, block)
        if allocation.instances:
            if not complete:
                self._let_go(state, allocation)
            for instance in allocation.instances.values():
                if instance.limited:
                    self._look_ahead(state, instance)
        if self._gradual is not None:
            for change in self._gradual.advance(self._fleet, state, allocation):
                self._apply(state, change)

    def _advance(self, state: ModelState, node: NodeId, block: int) -> None:
        """Form the pipelines that only waited for this block."""
        ready, arrived = [], (node, block)
        for pending in state.pending:
            missing = pending.missing
            if arrived in missing:
                missing.remove(arrived)
            if not missing:
                ready.append(pending)
        for pending in ready:
            self._form(state, pending)

    def _apply(self, state: ModelState, change: Change) -> None:
        if isinstance(change, Reshape):
            self._reshape(state, state.instances[change.instance], change)
            return
        allocation = state.allocations[change.node]
        self._allocations.widen(state, allocation, change.blocks)
        self._transfers.load(state, change.node, change.tier, change.blocks)

    # -- instances ---------------------------------------------------------------------------------------------------

    def _form(self, state: ModelState, pending: PendingPipeline) -> None:
        """Let a pipeline serve whose blocks are in place; with ``form`` "useful" only if it gives something."""
        plan = pending.plan
        state.pending.remove(pending)
        room = None
        if plan.form == "useful":
            room = self._room(state, plan.stages, plan.switch)
            if not room:
                return
        self._serve_pipeline(state, plan.stages, plan.switch, room)
        self._router.fill(state)

    def _serve_pipeline(self, state: ModelState, stages: tuple[Stage, ...], switch: SwitchRule, room: int | None) -> Instance:
        """Start a pipeline that takes ``room`` requests at most; None: as many as it has places for."""
        instance = self._serve(state, stages)
        instance.switch, instance.limited = switch, room is not None
        if room is not None:
            instance.capacity = min(instance.capacity, room)
        return instance

    def _room(self, state: ModelState, stages: tuple[Stage, ...], switch: SwitchRule) -> int:
        """Number of requests that a pipeline brings to first tokens before its mode switch."""
        return costs_now(self._fleet, state).room(stages, self._left_s(state, (stage.node for stage in stages), switch))

    def _left_s(self, state: ModelState, nodes: Iterable[NodeId], switch: SwitchRule) -> float:
        """Predict the seconds until a pipeline on ``nodes`` dissolves or the first of them leaves it."""
        allocations, at = state.allocations, self._fleet.at
        left = [left_s(allocations[node], at) for node in nodes]
        return max(left) if switch == "all" else min(left)

    def _look_ahead(self, state: ModelState, pipeline: Instance) -> None:
        """Give a pipeline further requests only while one of them would get a token before the mode switch."""
        pass_s, at = costs_now(self._fleet, state).pass_s(pipeline.stages, 1), self._fleet.at
        loading = (a for node in pipeline.nodes if not (a := state.allocations[node]).complete)
        last = (pass_s <= left_s(allocation, at) for allocation in loading)
        before, pipeline.open = pipeline.open, any(last) if pipeline.switch == "all" else all(last)
        if pipeline.open and not before:
            self._router.fill(state)

    def _node_complete(self, state: ModelState, allocation: Allocation) -> None:
        # A pipeline that is not ready by the time one of its nodes can serve alone has come too late.
        state.pending = [p for p in state.pending if allocation.node not in p.plan.nodes]
        if not allocation.instances:
            self._serve_alone(state, allocation)
            self._router.fill(state)
            return
        for instance in list(allocation.instances.values()):
            if instance.is_pipeline:
                self._leave(state, instance)

    def _let_go(self, state: ModelState, allocation: Allocation) -> None:
        """Let complete nodes leave their pipelines if this one's new block has made up for theirs."""
        for pipeline in list(allocation.instances.values()):
            if pipeline.switch == "each" and any(state.allocations[node].complete for node in pipeline.nodes):
                self._leave(state, pipeline)

    def _serve_alone(self, state: ModelState, allocation: Allocation) -> Instance:
        return self._serve(state, (Stage(allocation.node, 0, state.blocks - 1),))

    def _serve(self, state: ModelState, stages: tuple[Stage, ...]) -> Instance:
        """Start an instance. It keeps as many batches in flight as it has GPUs in a row (reference, section 2.4)."""
        fleet, name = self._fleet, state.spec.name
        instance = Instance(fleet.new_id(), name, fleet.at)
        self._set_stages(state, instance, stages)
        fleet.instances[instance.instance_id] = state.instances[instance.instance_id] = instance
        fleet.out.append(Serve(instance.instance_id, name, stages, state.block_bytes, instance.kv_tokens))
        return instance

    def _set_stages(self, state: ModelState, instance: Instance, stages: tuple[Stage, ...]) -> None:
        for node in instance.nodes:
            state.allocations[node].instances.pop(instance.instance_id, None)
        instance.set_stages(stages)
        instance.capacity = self._places(state, len(instance.nodes))
        instance.kv_tokens = self._kv_tokens(state, stages)
        for node in instance.nodes:
            state.allocations[node].instances[instance.instance_id] = instance

    def _places(self, state: ModelState, nodes: int) -> int:
        """Number of requests that instances on so many nodes take at once."""
        return nodes * state.spec.gpus_per_replica * self._batching.max_batch

    @staticmethod
    def _kv_tokens(state: ModelState, stages: Sequence[Stage]) -> int:
        """KV memory of an instance: the least of its nodes'.

        A node with more than its part of a pipeline's layers holds less for each batch. The promise does not say so, since mode
        switches move requests to pipelines cut otherwise: a live one runs fewer requests at once there, and the others wait.
        """
        return min(state.kv_tokens[stage.node] for stage in stages)

    def _reshape(self, state: ModelState, instance: Instance, change: Reshape) -> None:
        """Move an instance to other stages; requests that may need more KV memory than those have are restarted elsewhere."""
        room = self._kv_tokens(state, change.stages)
        if all(request.kv_tokens <= room for request in instance.outstanding.values()):
            kv = self._kv.at_repartition(state, instance, change.stages)
            self._set_stages(state, instance, change.stages)
            self._fleet.out.append(Repartition(instance.instance_id, change.stages, kv, room))
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

    def _leave(self, state: ModelState, pipeline: Instance) -> None:
        """Dissolve a pipeline whose nodes are complete; with ``switch`` "each" also one whose requests can do without its others.

        They can if the others can go on by themselves, or if the complete nodes have places for all of them.
        """
        held = {node: a.blocks for node in pipeline.nodes if not (a := state.allocations[node]).complete}
        if not held:
            self._switch_mode(state, pipeline)
        elif pipeline.switch == "each":
            stages = divide(held, state.blocks) if len(held) > 1 else None
            running = len(pipeline.outstanding)
            kept = -(-running * len(held) // len(pipeline.nodes))
            room = None if stages is None or not pipeline.limited else self._room(state, stages, "each")
            if stages is not None and (room is None or room >= max(1, kept)):
                self._switch_mode(state, pipeline, stages, room)
            elif running <= self._places(state, len(pipeline.nodes) - len(held)):
                self._switch_mode(state, pipeline)

    def _switch_mode(self, state: ModelState, pipeline: Instance, rest: tuple[Stage, ...] = (), room: int | None = None) -> None:
        """Let complete nodes serve alone, the others on the stages ``rest``; they share the running requests (paper, 4.4).

        ``room``: number of requests that the smaller pipeline takes at most, as the one before was limited; None: as many as it
        has places for.
        """
        self.drop(state, pipeline)
        targets = [self._replica_on(state, a) for node in pipeline.nodes if (a := state.allocations[node]).complete]
        if rest:
            smaller = self._serve_pipeline(state, rest, pipeline.switch, room)
            targets += [smaller] * len(smaller.nodes)
        loads = {instance.instance_id: len(instance.outstanding) for instance in targets}
        moves = spread_requests(list(pipeline.outstanding), [instance.instance_id for instance in targets], loads)
        for request_id, instance_id in moves:
            state.instances[instance_id].outstanding[request_id] = pipeline.outstanding[request_id]
            self._fleet.moved[request_id] = instance_id
        self._fleet.out.append(SwitchMode(pipeline.instance_id, moves, self._kv.at_switch(state, pipeline, moves)))
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
