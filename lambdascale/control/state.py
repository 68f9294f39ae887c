"""The control plane's picture of the cluster: mutable records shared by its parts, and the commands decided so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

from lambdascale.control.calm import Calm
from lambdascale.control.prospects import Passes
from lambdascale.control.traffic import Port, Traffic
from lambdascale.core import ClusterSpec, ModelSpec, NodeId, PipelinePlan, Request, Stage, SwitchRule
from lambdascale.core.commands import Command, Storage, Tier
from lambdascale.memory import HostMemoryConfig
from lambdascale.pipelines import Costs


@dataclass(slots=True, eq=False)
class Instance:
    """A list of stages that takes requests; a replica has one stage.

    ``capacity`` bounds the requests it has at once; ``kv_tokens`` is the KV memory that one of them can have, in tokens.
    ``switch``: when a pipeline dissolves, see PipelinePlan. ``limited``: it takes only what it can bring to first tokens by
    then. ``open``: it takes further requests.
    ``draining``: it gets new requests only where no other instance has room, and is released once it has none. ``nodes``: the
    distinct nodes of the stages, in order of first appearance.
    """

    instance_id: int
    model: str
    idle_since: float
    stages: tuple[Stage, ...] = ()
    capacity: int = 0
    kv_tokens: int = 0
    switch: SwitchRule = "all"
    limited: bool = False
    open: bool = True
    outstanding: dict[int, Request] = field(default_factory=dict)
    draining: bool = False
    nodes: tuple[NodeId, ...] = ()

    def set_stages(self, stages: tuple[Stage, ...]) -> None:
        """Serve by other stages."""
        self.stages = stages
        self.nodes = tuple(dict.fromkeys(stage.node for stage in stages))

    @property
    def is_pipeline(self) -> bool:
        """True with more than one stage."""
        return len(self.stages) > 1


@dataclass(slots=True, eq=False)
class Allocation:
    """GPUs of a node held for a model, from their allocation to their release.

    ``wanted``: the blocks the node is to hold, of ``total``; fewer than all for a share. ``blocks``: those it holds.
    ``began_at``, ``first_at``: time of its allocation, and of its first block. ``instances``: those it serves in.
    ``transfers``: number of transfers under way in which it is a source or a destination that passes blocks on.
    ``failures``: failures in a row of instances on it. ``since``: the last id that was given out before it.
    """

    node: NodeId
    model: str
    wanted: set[int]
    total: int
    blocks: set[int] = field(default_factory=set)
    instances: dict[int, Instance] = field(default_factory=dict)
    incoming: dict[int, TransferState] = field(default_factory=dict)
    transfers: int = 0
    failures: int = 0
    began_at: float = 0.0
    since: int = 0
    first_at: float | None = None

    @property
    def complete(self) -> bool:
        """True once the node holds the whole model."""
        return len(self.blocks) == self.total

    @property
    def is_share(self) -> bool:
        """True if the node is to hold only a part of the model."""
        return len(self.wanted) < self.total


@dataclass(slots=True, eq=False)
class PendingPipeline:
    """A planned pipeline that waits for the (node, block) pairs in ``missing``."""

    plan: PipelinePlan
    missing: set[tuple[NodeId, int]]


@dataclass(slots=True, eq=False)
class TransferState:
    """A multicast (``sources`` and many nodes) or a load (one node) under way.

    ``waiting``: for each destination that is not through, the blocks the transfer still has to bring it and the node that sends
    each (itself, for a load). ``ports``: those that a sender uses, where they are not just its NIC. ``members``: all nodes that
    take part; one that is through may still have to pass blocks on. ``held``: their allocations, and ``sources``: the (node,
    tier) pairs read from; both stay until the transfer ends. ``again``: the transfer brings the rest of a failed multicast.
    """

    transfer_id: int
    model: str
    waiting: dict[NodeId, dict[int, NodeId]]
    ports: dict[NodeId, tuple[Port, ...]]
    members: frozenset[NodeId]
    held: tuple[Allocation, ...]
    sources: tuple[tuple[NodeId, str], ...]
    multicast: bool
    again: bool = False


@dataclass(slots=True, eq=False)
class ModelState:
    """Everything about one model: its queue, the instances that serve it, the nodes that hold it or receive it.

    ``spared``: blocks that its shares leave out. ``kv_tokens``: tokens of KV memory beside the model on each
    node whose GPUs can hold it; ``least_kv_tokens``: the least of them.
    ``unfit``: nodes on which its instances keep failing; ``reason``: the last failure. ``looks``: the loads that no later one
    exceeds, as (time of the last look at the load before it, queued, running requests); the last one is that of ``looked_s``,
    the time of the last look. ``draining``: number of drained instances, at most. ``calm``: see Calm.
    """

    spec: ModelSpec
    block_bytes: tuple[int, ...]
    kv_tokens: dict[NodeId, int]
    queue: deque[Request] = field(default_factory=deque)
    instances: dict[int, Instance] = field(default_factory=dict)
    allocations: dict[NodeId, Allocation] = field(default_factory=dict)
    pending: list[PendingPipeline] = field(default_factory=list)
    unfit: set[NodeId] = field(default_factory=set)
    reason: str = ""
    running: int = 0
    spared: int = 0
    looks: deque[tuple[float, int, int]] = field(default_factory=lambda: deque([(-inf, 0, 0)]))
    looked_s: float = -inf
    draining: int = 0
    calm: Calm = field(default_factory=Calm)
    least_kv_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        """Work out the least KV memory."""
        self.least_kv_tokens = min(self.kv_tokens.values())

    @property
    def blocks(self) -> int:
        """Number of blocks the model is cut into."""
        return len(self.block_bytes)

    @property
    def replicas(self) -> int:
        """Number of copies of the model that its allocations hold or are to hold; shares add up."""
        held = len(self.allocations)
        return held - self.spared // len(self.block_bytes) if self.spared else held


class Fleet:
    """Nodes, models, host copies and transfers, and ``out``: the commands of the event being handled.

    ``traffic``: bytes that the nodes' ports have still to move for the transfers. ``storage``: the tier in which every node finds
    models that it has no host copy of. ``max_batch``: requests of an instance per node it has. ``returning``: lost nodes that
    will be started again.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        models: Sequence[ModelSpec],
        blocks: int,
        memory: HostMemoryConfig,
        storage: Storage = "ssd",
        *,
        max_batch: int,
    ) -> None:
        self.cluster = cluster
        self.passes = Passes(cluster, max_batch)
        self.storage = storage
        self.at = 0.0
        self.out: list[Command] = []
        # First passes of what waits, by model (see costs_now). What waits or runs changes only as a request arrives or ends, and
        # with a command: so they hold while neither happens, and are not used in an event that has led to a command already.
        self.costs: dict[str, Costs] = {}
        self.gpus_free: dict[NodeId, int] = {}
        self.returning: set[NodeId] = set()
        self.host = memory.build({node: cluster.node(node).host_memory_bytes for node in range(cluster.nodes)})
        self.transfers: dict[int, TransferState] = {}
        self.traffic = Traffic(cluster, storage)
        self.instances: dict[int, Instance] = {}
        # The instance a mode switch moved a request to: its last event may still come in under the pipeline's name.
        self.moved: dict[int, int] = {}
        # Tokens that each unfinished request is known to have. Backends need not report more than the first.
        self.produced: dict[int, int] = {}
        # Number of failed instances each unfinished request was on.
        self.failures: dict[int, int] = {}
        self.models = {
            model.name: ModelState(
                spec=model,
                block_bytes=tuple(block.size_bytes for block in model.partition(blocks)),
                kv_tokens={n: tokens for n in range(cluster.nodes) if (tokens := cluster.node(n).kv_tokens(model)) > 0},
            )
            for model in models
        }
        self._next_id = 0

    def new_id(self) -> int:
        """Return a fresh id for an instance, a transfer or a timer."""
        self._next_id += 1
        return self._next_id

    @property
    def last_id(self) -> int:
        """The id given out last; 0 before the first."""
        return self._next_id

    def can_serve(self, state: ModelState) -> bool:
        """True if a node can serve the model at all: one that lives, or one that will be started again."""
        if not state.unfit and self.gpus_free and len(state.kv_tokens) == self.cluster.nodes:
            return True
        if self.returning and not self.returning.isdisjoint(state.kv_tokens):
            return True
        return any(True for _ in self.candidates(state))

    def candidates(self, state: ModelState) -> Iterable[NodeId]:
        """Living nodes on which the model can be served at all, busy ones included."""
        return (node for node in self.gpus_free if node in state.kv_tokens and node not in state.unfit)

    def free_nodes(self, state: ModelState) -> list[NodeId]:
        """Nodes that could take an allocation of the model now; if the queue needs larger ones than it has, those only."""
        gpus, room, fit, unfit, held = (
            state.spec.gpus_per_replica,
            self.lacking(state),
            state.kv_tokens,
            state.unfit,
            state.allocations,
        )
        free = [n for n, left in self.gpus_free.items() if left >= gpus and n not in held and n in fit and n not in unfit]
        return [n for n in free if fit[n] >= room] if room else free

    def most_kv_tokens(self, state: ModelState) -> int:
        """Return the most KV memory of a node that can serve the model: one that lives, or one that will be started again."""
        nodes = [*self.candidates(state), *(node for node in self.returning if node in state.kv_tokens)]
        return max((state.kv_tokens[node] for node in nodes), default=0)

    def lacking(self, state: ModelState) -> int:
        """KV tokens that the head of the queue may need and no node allocated to the model has; 0 if nothing is lacking."""
        needed = state.queue[0].kv_tokens if state.queue else 0
        if needed <= state.least_kv_tokens or any(state.kv_tokens[node] >= needed for node in state.allocations):
            return 0
        return needed

    def lacks_room(self, state: ModelState) -> bool:
        """True if a request in the queue may need KV tokens that no node allocated to the model has: its head, or a later one."""
        most = max((state.kv_tokens[node] for node in state.allocations), default=state.least_kv_tokens)
        return any(request.kv_tokens > most for request in state.queue)

    def is_warm(self, state: ModelState, node: NodeId) -> bool:
        """True if the node has a host copy of the model."""
        return self.host.has(node, state.spec.name, self.at)

    def own_tier(self, state: ModelState, node: NodeId) -> Tier:
        """Return the fastest tier from which ``node`` can load the model without another node's help."""
        return "host" if self.is_warm(state, node) else self.storage
