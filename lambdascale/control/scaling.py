"""Scale-out and scale-in: which nodes get a model, from where, and who serves while the blocks arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lambdascale.control.placement import Placement, by_locality, by_startup_time, sparing_copies
from lambdascale.control.router import Router
from lambdascale.control.state import Allocation, Fleet, Instance, ModelState, PendingPipeline, TransferState
from lambdascale.core import ClusterSpec, MulticastPlan, NodeId, PipelinePlan, Send, Stage
from lambdascale.core.commands import (
    AllocateNode,
    EvictBlocks,
    LoadBlocks,
    ReleaseNode,
    Serve,
    StartMulticast,
    StopInstance,
    SwitchMode,
    Tier,
)
from lambdascale.multicast import injection_orders
from lambdascale.pipelines import spread_requests

if TYPE_CHECKING:
    from lambdascale.control.system import SystemConfig

# The stand-in source of the plan that describes nodes loading for themselves, each in its own order.
_STORE = -1


class Scaler:
    """Carries the autoscaler's wishes out on the fleet, for every system alike."""

    def __init__(self, config: SystemConfig, fleet: Fleet, router: Router) -> None:
        self._config = config
        self._fleet = fleet
        self._router = router
        self._own_copies = self._prefers_own_copies(fleet.cluster)
        self._place = self._placement()

    def _prefers_own_copies(self, cluster: ClusterSpec) -> bool:
        """Whether a node with a host copy loads it itself although a multicast could bring the model."""
        network = float(cluster.nic_bytes_per_s) * cluster.rdma_efficiency
        faster = float(cluster.pcie_bytes_per_s) >= network
        return self._config.warm_loads == "always" or (self._config.warm_loads == "faster" and faster)

    def _placement(self) -> Placement:
        if self._config.placement == "startup_time":
            return by_startup_time
        return by_locality if self._own_copies or self._config.scale_out != "multicast" else sparing_copies

    # -- scale-out ---------------------------------------------------------------------------------------------------

    def provision(self, state: ModelState, replicas: int) -> None:
        """Put ``replicas`` in place at the start of a run, without loading time."""
        for node in self.free_nodes(state)[:replicas]:
            self._allocate(state, node)
            self._load(state, node, "instant", range(len(state.block_bytes)))

    def scale_out(self, state: ModelState, replicas: int) -> None:
        """Start up to ``replicas`` more replicas of a model on the best free nodes there are.

        A source feeds one multicast at a time (unless ``share_sources``): while all are busy, nodes that depend on one are not
        taken yet.
        """
        nodes = self.free_nodes(state)[:replicas]
        if not nodes:
            return
        warm = self._load_themselves(state, nodes)
        cold = [node for node in nodes if node not in warm]
        sources: list[tuple[NodeId, Tier]] = []
        if cold and self._config.scale_out == "multicast":
            holders = self._holders(state, cold)
            sources = self._idle(holders, len(cold))
            if holders and not sources:
                nodes, cold = warm, []
        for node in nodes:
            self._allocate(state, node)
        if self._config.scale_out == "instant":
            for node in nodes:
                self._load(state, node, "instant", range(len(state.block_bytes)))
        elif sources:
            self._load_together(state, warm)
            self._multicast(state, sources, cold)
        else:
            self._load_together(state, warm)
            self._load_together(state, cold)

    def _load_themselves(self, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """Those of ``nodes`` with a host copy, if they are to load it over PCIe.

        They do where that beats the network, and also where they can feed others from host memory meanwhile.
        """
        if self._config.warm_loads == "never":
            return []
        warm = [node for node in nodes if self._fleet.host.has(node, state.spec.name, self._fleet.at)]
        feeds_others = self._config.host_sources and len(warm) < len(nodes)
        return warm if self._own_copies or feeds_others else []

    def free_nodes(self, state: ModelState) -> list[NodeId]:
        """Nodes that could take a replica of the model, best first."""
        needed = state.spec.gpus_per_replica
        free = [node for node, gpus in self._fleet.gpus_free.items() if gpus >= needed and node not in state.allocations]
        return self._place(self._fleet, state, free)

    def _holders(self, state: ModelState, targets: Sequence[NodeId]) -> list[tuple[int, int, NodeId, Tier]]:
        """All that could feed a multicast to ``targets``: (transfers it feeds now, 0 for GPU and 1 for host, node, tier)."""
        fleet, name = self._fleet, state.spec.name
        found: list[tuple[int, int, NodeId, Tier]] = [
            (allocation.transfers, 0, node, "gpu") for node, allocation in state.allocations.items() if allocation.complete
        ]
        if self._config.host_sources:
            excluded = {node for _, _, node, _ in found}.union(targets)
            copies = (node for node in fleet.host.holders(fleet.gpus_free, name, fleet.at) if node not in excluded)
            found += [(fleet.host.pins(node, name), 1, node, "host") for node in copies]
        return sorted(found)

    def _idle(self, holders: Sequence[tuple[int, int, NodeId, Tier]], destinations: int) -> list[tuple[NodeId, Tier]]:
        """The sources to use: idle ones, GPU replicas before host copies, at most one per destination."""
        wanted = destinations if self._config.sources == "auto" else min(self._config.sources, destinations)
        idle = [holder for holder in holders if holder[0] == 0]
        if not idle and self._config.share_sources:
            idle = list(holders[:1])
        return [(node, tier) for _, _, node, tier in idle][:wanted]

    def _multicast(self, state: ModelState, sources: Sequence[tuple[NodeId, Tier]], nodes: Sequence[NodeId]) -> None:
        abstract = self._config.planner.plan(sources=len(sources), destinations=len(nodes), blocks=len(state.block_bytes))
        used = sources[: len(abstract.sources)]
        plan = abstract.on([*(node for node, _ in used), *nodes])
        self.start_multicast(state, plan, used)
        self._expect(state, self._config.pipelines.pipelines(plan))

    def start_multicast(
        self, state: ModelState, plan: MulticastPlan, sources: Sequence[tuple[NodeId, Tier]], *, again: bool = False
    ) -> None:
        """Issue a plan over real nodes; ``again``: see TransferState."""
        transfer_id = self._begin(state, plan.destinations, sources, multicast=True, again=again)
        tiers = tuple(tier for _, tier in sources)
        command = StartMulticast(transfer_id, state.spec.name, plan, state.block_bytes, tiers, self._config.multicast)
        self._fleet.out.append(command)

    def _load_together(self, state: ModelState, nodes: Sequence[NodeId]) -> None:
        """Every node loads for itself; with pipelines, in shifted orders, so that together they soon hold the model."""
        if not nodes:
            return
        blocks = len(state.block_bytes)
        plan = _plan_of_loads(nodes, injection_orders(blocks, len(nodes)))
        pipelines = self._config.pipelines.pipelines(plan) if len(nodes) > 1 else ()
        for node, order in zip(nodes, plan.orders, strict=True):
            warm = self._fleet.host.has(node, state.spec.name, self._fleet.at)
            self._load(state, node, "host" if warm else "ssd", order if pipelines else range(blocks))
        self._expect(state, pipelines)

    def _load(self, state: ModelState, node: NodeId, tier: Tier, order: Sequence[int]) -> None:
        sources: list[tuple[NodeId, Tier]] = [(node, tier)] if tier == "host" else []
        transfer_id = self._begin(state, [node], sources, multicast=False)
        loader = self._config.loader
        self._fleet.out.append(LoadBlocks(transfer_id, state.spec.name, node, tuple(order), state.block_bytes, tier, loader))

    def load_missing(self, state: ModelState, node: NodeId) -> None:
        """Let a node load the blocks it lacks from its own host memory or SSD."""
        warm = self._fleet.host.has(node, state.spec.name, self._fleet.at)
        held = state.allocations[node].blocks
        self._load(state, node, "host" if warm else "ssd", [b for b in range(len(state.block_bytes)) if b not in held])

    def _allocate(self, state: ModelState, node: NodeId) -> None:
        gpus = state.spec.gpus_per_replica
        self._fleet.gpus_free[node] -= gpus
        state.allocations[node] = Allocation(node, state.spec.name)
        self._fleet.out.append(AllocateNode(node, state.spec.name, gpus))

    def _begin(
        self,
        state: ModelState,
        waiting: Sequence[NodeId],
        sources: Sequence[tuple[NodeId, Tier]],
        *,
        multicast: bool,
        again: bool = False,
    ) -> int:
        transfer_id = self._fleet.new_id()
        members = frozenset([*waiting, *(node for node, _ in sources)])
        held = tuple(allocation for node, allocation in state.allocations.items() if node in members)
        transfer = TransferState(transfer_id, state.spec.name, set(waiting), members, held, tuple(sources), multicast, again)
        self._fleet.transfers[transfer_id] = transfer
        for allocation in held:
            allocation.transfers += 1
        for node, tier in sources:
            if tier == "host":
                self._fleet.host.pin(node, state.spec.name)
        return transfer_id

    def end_transfer(self, transfer: TransferState) -> None:
        """A transfer is done or given up: its members are free again."""
        del self._fleet.transfers[transfer.transfer_id]
        for allocation in transfer.held:
            allocation.transfers -= 1
        for node, tier in transfer.sources:
            if tier == "host":
                self._fleet.host.unpin(node, transfer.model, self._fleet.at)

    # -- serving while blocks arrive ---------------------------------------------------------------------------------

    def _expect(self, state: ModelState, pipelines: Sequence[PipelinePlan]) -> None:
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
        if len(allocation.blocks) == len(state.block_bytes):
            self._node_complete(state, allocation)
            return
        for pending in state.pending:
            pending.missing.discard((node, block))
        for pending in [p for p in state.pending if not p.missing]:
            self._form(state, pending)

    def _form(self, state: ModelState, pending: PendingPipeline) -> None:
        state.pending.remove(pending)
        stages = pending.plan.stages
        # A pipeline keeps as many batches in flight as it has nodes (reference, section 2.4).
        nodes = pending.plan.nodes
        instance = self._new_instance(state, nodes, len(nodes) * self._config.batching.max_batch, is_pipeline=True)
        self._fleet.out.append(Serve(instance.instance_id, state.spec.name, stages, state.block_bytes))
        self._router.fill(state)

    def _node_complete(self, state: ModelState, allocation: Allocation) -> None:
        allocation.complete = True
        node, name = allocation.node, state.spec.name
        for transfer in [t for t in self._fleet.transfers.values() if t.model == name and node in t.waiting]:
            transfer.waiting.discard(node)
            if not transfer.waiting:
                self.end_transfer(transfer)
        # A pipeline that is not ready by the time one of its nodes can serve alone has come too late.
        state.pending = [p for p in state.pending if node not in p.plan.nodes]
        pipeline = allocation.instance
        if pipeline is None:
            self._start_replica(state, allocation)
            self._router.fill(state)
        elif all(state.allocations[n].complete for n in pipeline.nodes):
            self._switch_mode(state, pipeline)

    def _start_replica(self, state: ModelState, allocation: Allocation) -> Instance:
        instance = self._new_instance(state, (allocation.node,), self._config.batching.max_batch, is_pipeline=False)
        whole = (Stage(allocation.node, 0, len(state.block_bytes) - 1),)
        self._fleet.out.append(Serve(instance.instance_id, state.spec.name, whole, state.block_bytes))
        return instance

    def _switch_mode(self, state: ModelState, pipeline: Instance) -> None:
        """All nodes of a pipeline are complete: each serves alone and takes its share of the running requests (paper, 4.4)."""
        self.drop_instance(state, pipeline)
        replicas = {i.instance_id: i for i in (self._start_replica(state, state.allocations[n]) for n in pipeline.nodes)}
        moves = spread_requests(list(pipeline.outstanding), list(replicas), dict.fromkeys(replicas, 0))
        for request_id, instance_id in moves:
            replicas[instance_id].outstanding[request_id] = pipeline.outstanding[request_id]
            self._fleet.moved[request_id] = instance_id
        self._fleet.out.append(SwitchMode(pipeline.instance_id, moves, self._config.kv))
        self._router.fill(state)

    def serve_alone(self, state: ModelState, nodes: Sequence[NodeId]) -> None:
        """Start replicas on those of ``nodes`` that hold the whole model and serve nothing."""
        for node in nodes:
            allocation = state.allocations.get(node)
            if allocation is not None and allocation.complete and allocation.instance is None:
                self._start_replica(state, allocation)

    def _new_instance(self, state: ModelState, nodes: tuple[NodeId, ...], capacity: int, *, is_pipeline: bool) -> Instance:
        fleet = self._fleet
        instance = Instance(fleet.new_id(), state.spec.name, nodes, capacity, is_pipeline, fleet.at)
        fleet.instances[instance.instance_id] = state.instances[instance.instance_id] = instance
        for node in nodes:
            state.allocations[node].instance = instance
        return instance

    def drop_instance(self, state: ModelState, instance: Instance) -> None:
        """Forget an instance; its outstanding requests are the caller's business."""
        del self._fleet.instances[instance.instance_id], state.instances[instance.instance_id]
        for node in instance.nodes:
            if node in state.allocations:
                state.allocations[node].instance = None

    # -- scale-in ----------------------------------------------------------------------------------------------------

    def idle_replicas(self, state: ModelState) -> list[Allocation]:
        """Allocations that could be released now, longest idle first."""
        idle = [
            (a.instance.idle_since, a.node, a)
            for a in state.allocations.values()
            if a.instance is not None and not a.instance.is_pipeline and not a.instance.outstanding and not a.transfers
        ]
        return [allocation for _, _, allocation in sorted(idle, key=lambda entry: entry[:2])]

    def release(self, state: ModelState, allocation: Allocation) -> None:
        """Take an idle replica out of service and free its GPUs; its weights stay behind as a host copy if there is room."""
        assert allocation.instance is not None, f"node {allocation.node} serves nothing"
        fleet, node, name = self._fleet, allocation.node, state.spec.name
        fleet.out.append(StopInstance(allocation.instance.instance_id))
        self.drop_instance(state, allocation.instance)
        del state.allocations[node]
        fleet.gpus_free[node] += state.spec.gpus_per_replica
        # The room for the copy is made before the copy.
        evicted = fleet.host.put(node, name, state.spec.size_bytes, fleet.at)
        fleet.out += [EvictBlocks(node, model, "host") for model in evicted]
        kept = fleet.host.has(node, name, fleet.at)
        fleet.out.append(ReleaseNode(node, name, state.spec.gpus_per_replica, kept))


def _plan_of_loads(nodes: Sequence[NodeId], orders: Sequence[Sequence[int]]) -> MulticastPlan:
    """Nodes that load for themselves at one rate, written as a plan whose sub-groups are the single nodes."""
    rounds = tuple(
        tuple(Send(_STORE, node, order[r]) for node, order in zip(nodes, orders, strict=True)) for r in range(len(orders[0]))
    )
    return MulticastPlan(
        members=(_STORE, *nodes),
        sources=(_STORE,),
        blocks=len(orders[0]),
        rounds=rounds,
        groups=tuple((_STORE, node) for node in nodes),
        orders=tuple(tuple(order) for order in orders),
    )
