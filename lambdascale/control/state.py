"""The control plane's picture of the cluster: mutable records shared by its parts, and the commands decided so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lambdascale.core import ClusterSpec, ModelSpec, NodeId, PipelinePlan, Request
from lambdascale.core.commands import Command
from lambdascale.memory import HostCacheConfig, HostCaches


@dataclass(slots=True, eq=False)
class Instance:
    """A replica (one node) or a pipeline (several) that takes requests; ``capacity`` bounds those it has at once."""

    instance_id: int
    model: str
    nodes: tuple[NodeId, ...]
    capacity: int
    is_pipeline: bool
    idle_since: float
    outstanding: dict[int, Request] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Allocation:
    """A model on a node, from the allocation of its GPUs to their release. ``instance`` serves it, if any does.

    ``transfers``: those under way it has a part in, as a source, or as a destination that passes blocks on.
    """

    node: NodeId
    model: str
    blocks: set[int] = field(default_factory=set)
    instance: Instance | None = None
    complete: bool = False
    transfers: int = 0


@dataclass(slots=True, eq=False)
class PendingPipeline:
    """A planned pipeline that waits for the (node, block) pairs in ``missing``."""

    plan: PipelinePlan
    missing: set[tuple[NodeId, int]]


@dataclass(slots=True, eq=False)
class TransferState:
    """A multicast (``sources`` and many nodes) or a load (one node) under way; ``waiting`` are the nodes not yet complete.

    ``members`` are all nodes that have a part in it: a complete one may still have to pass blocks on. ``held`` are
    their allocations and ``sources`` the (node, tier) pairs it reads from: both must stay until it ends. ``again``: it brings the
    rest of a multicast that failed on nodes that live.
    """

    transfer_id: int
    model: str
    waiting: set[NodeId]
    members: frozenset[NodeId]
    held: tuple[Allocation, ...]
    sources: tuple[tuple[NodeId, str], ...]
    multicast: bool
    again: bool = False


@dataclass(slots=True, eq=False)
class ModelState:
    """Everything about one model: its queue, the instances that serve it, the nodes that have it or are getting it."""

    spec: ModelSpec
    block_bytes: tuple[int, ...]
    kv_tokens: int
    queue: deque[Request] = field(default_factory=deque)
    instances: dict[int, Instance] = field(default_factory=dict)
    allocations: dict[NodeId, Allocation] = field(default_factory=dict)
    pending: list[PendingPipeline] = field(default_factory=list)
    running: int = 0


class Fleet:
    """Nodes, models, host copies and transfers, and ``out``: the commands of the event being handled."""

    def __init__(self, cluster: ClusterSpec, models: Sequence[ModelSpec], blocks: int, memory: HostCacheConfig) -> None:
        self.cluster = cluster
        self.at = 0.0
        self.out: list[Command] = []
        self.gpus_free: dict[NodeId, int] = {}
        self.host = HostCaches(memory, int(cluster.host_memory_bytes))
        self.transfers: dict[int, TransferState] = {}
        self.instances: dict[int, Instance] = {}
        # Where a mode switch took a request: its last event may still come in under the pipeline's name.
        self.moved: dict[int, int] = {}
        self.models = {
            model.name: ModelState(
                spec=model,
                block_bytes=tuple(block.size_bytes for block in model.partition(blocks)),
                kv_tokens=cluster.kv_tokens(model),
            )
            for model in models
        }
        self._next_id = 0

    def new_id(self) -> int:
        """A fresh id for an instance, a transfer or a timer."""
        self._next_id += 1
        return self._next_id

    def loads_on(self, node: NodeId) -> int:
        """Bytes still to be loaded by ``node``, as a bound: whole models count until they are complete."""
        waiting = (t for t in self.transfers.values() if node in t.waiting)
        return sum(self.models[t.model].spec.size_bytes for t in waiting)
