"""SimBackend: the simulated cluster behind the control plane's Backend protocol. Deterministic for a seed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lambdascale.control.batching import BatchedRequest, BatchLimits
from lambdascale.core import ClusterSpec, ModelSpec, NodeId, Request
from lambdascale.core.checks import check_types, require
from lambdascale.core.commands import (
    AllocateNode,
    CancelTransfer,
    Command,
    Dispatch,
    EvictBlocks,
    FailRequest,
    LoadBlocks,
    PlaceCopy,
    ReleaseNode,
    Serve,
    SetTimer,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import BlockArrived, Event, NodeJoined, NodeLost, RequestArrived, TimerFired
from lambdascale.core.timing import ComputeModel
from lambdascale.sim.instances import SimInstance, SimPipeline, SimReplica
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.options import TransferOptions
from lambdascale.sim.sharing import SharedCores
from lambdascale.sim.transfers import TransferEngine


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """The simulated cluster. ``transfers``: how data moves. ``node_failures``: (node, time in seconds) pairs.

    ``slow_nodes``: (node, share) pairs; such a node's NIC has that share of the cluster's rate, and nobody is told.
    """

    transfers: TransferOptions = field(default_factory=TransferOptions)
    node_failures: tuple[tuple[int, float], ...] = ()
    slow_nodes: tuple[tuple[int, float], ...] = ()
    kind: str = "sim"

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("node_failures", "slow_nodes"):
            object.__setattr__(self, name, tuple(tuple(pair) for pair in getattr(self, name)))
        check_types(self)
        require(self.kind == "sim", f"backend.kind of the simulator is 'sim', not {self.kind!r}")
        for failure in self.node_failures:
            require(len(failure) == 2 and failure[1] >= 0, f"backend.node_failures takes [node, time] pairs, not {failure!r}")
        for slow in self.slow_nodes:
            require(len(slow) == 2 and 0 < slow[1] <= 1, f"backend.slow_nodes takes [node, share up to 1] pairs, not {slow!r}")

    @property
    def label(self) -> str:
        """What rows and summaries call the backend."""
        return self.kind

    def build(
        self, *, cluster: ClusterSpec, models: Sequence[ModelSpec], requests: Sequence[Request], batching: BatchLimits, seed: int
    ) -> SimBackend:
        """The backend of one run."""
        for name in ("node_failures", "slow_nodes"):
            for node, _ in getattr(self, name):
                require(0 <= node < cluster.nodes, f"backend.{name} names node {node}, the cluster has 0 to {cluster.nodes - 1}")
        return SimBackend(config=self, cluster=cluster, models=models, requests=requests, batching=batching, seed=seed)


@dataclass(slots=True)
class _Placed:
    """An instance, the model it serves, and its nodes (a pipeline's: one per stage)."""

    instance: SimInstance
    model: str
    nodes: tuple[NodeId, ...]


class SimBackend:
    """Carries commands out in simulated time and feeds the trace in as it goes."""

    def __init__(
        self,
        *,
        config: SimConfig,
        cluster: ClusterSpec,
        models: Sequence[ModelSpec],
        requests: Sequence[Request],
        batching: BatchLimits,
        seed: int,
    ) -> None:
        self._cluster = cluster
        self._limits = batching
        self._models = {model.name: model for model in models}
        self._kv_tokens = {model.name: cluster.kv_tokens(model) for model in models}
        self._compute = {model.name: ComputeModel(cluster, model) for model in models}
        self.kernel = Kernel()
        self._cores = SharedCores(cluster.compute.shared_slowdown)
        self._events: deque[Event] = deque(NodeJoined(0.0, node) for node in range(cluster.nodes))
        self._requests = requests
        self._next_request = 0
        self._placed: dict[int, _Placed] = {}
        self._lost: set[NodeId] = set()
        self._occupied: dict[NodeId, int] = {}
        self._transfers = TransferEngine(
            self.kernel,
            cluster,
            config.transfers,
            np.random.default_rng(seed),
            self._block_arrived,
            self._occupy,
            layers={model.name: model.layers for model in models},
            nic_shares=dict(config.slow_nodes),
        )
        for node, at in config.node_failures:
            self.kernel.at(at, self._lose_node, node)
        self._handlers: dict[type[Command], Callable[[Any], None]] = {
            AllocateNode: self._nothing,
            ReleaseNode: self._nothing,
            PlaceCopy: self._nothing,
            EvictBlocks: self._nothing,
            FailRequest: self._nothing,
            StartMulticast: self._transfers.multicast,
            LoadBlocks: self._transfers.load,
            CancelTransfer: self._cancel,
            Serve: self._serve,
            Dispatch: self._dispatch,
            SwitchMode: self._switch_mode,
            StopInstance: self._stop_instance,
            SetTimer: self._set_timer,
        }

    # -- Backend -----------------------------------------------------------------------------------------------------

    def submit(self, command: Command) -> None:
        """Start carrying a command out."""
        self._handlers[type(command)](command)

    def next_event(self) -> Event | None:
        """The next event; requests arrive before anything else that happens at the same time."""
        events, kernel = self._events, self.kernel
        while not events:
            due = kernel.next_time()
            if self._next_request < len(self._requests):
                request = self._requests[self._next_request]
                if due is None or request.arrival_s <= due:
                    self._next_request += 1
                    kernel.now = request.arrival_s
                    return RequestArrived(request.arrival_s, request)
            if not kernel.step():
                return None
        return events.popleft()

    # -- commands ----------------------------------------------------------------------------------------------------

    def _nothing(self, command: Command) -> None:
        """Bookkeeping of the control plane that takes no time and changes nothing here."""

    def _cancel(self, command: CancelTransfer) -> None:
        self._transfers.cancel(command.transfer_id)

    def _set_timer(self, command: SetTimer) -> None:
        self.kernel.at(command.at, self._timer_fired, command.timer_id)

    def _timer_fired(self, timer_id: int) -> None:
        self._events.append(TimerFired(self.kernel.now, timer_id))

    def _serve(self, command: Serve) -> None:
        if self._lost.isdisjoint(stage.node for stage in command.stages):
            self._start_replica(command) if len(command.stages) == 1 else self._form_pipeline(command)

    def _start_replica(self, command: Serve) -> None:
        node = command.stages[0].node
        compute, kv_tokens = self._compute[command.model], self._kv_tokens[command.model]
        replica = SimReplica(command.instance, self.kernel, self._cores, compute, self._events.append, self._limits, kv_tokens)
        if self._occupied.get(node):
            replica.occupy(True)
        self._placed[command.instance] = _Placed(replica, command.model, (node,))

    def _form_pipeline(self, command: Serve) -> None:
        nodes = tuple(stage.node for stage in command.stages)
        total = sum(command.block_bytes)
        stages = [(s.node, sum(command.block_bytes[s.first_block : s.last_block + 1]) / total) for s in command.stages]
        pipeline = SimPipeline(
            command.instance,
            self.kernel,
            self._cores,
            self._compute[command.model],
            self._events.append,
            self._limits,
            self._kv_tokens[command.model],
            stages,
            self._cluster.hop_latency_s,
        )
        for _ in range(sum(bool(self._occupied.get(node)) for node in set(nodes))):
            pipeline.occupy(True)
        self._placed[command.instance] = _Placed(pipeline, command.model, nodes)

    def _dispatch(self, command: Dispatch) -> None:
        # An instance may be lost before the control plane has seen the event; it restarts the requests when it does.
        if command.instance in self._placed:
            self._placed[command.instance].instance.dispatch(command.requests)

    def _stop_instance(self, command: StopInstance) -> None:
        placed = self._placed.pop(command.instance, None)
        if placed is not None:
            placed.instance.drain()

    def _switch_mode(self, command: SwitchMode) -> None:
        placed = self._placed.pop(command.pipeline, None)
        if placed is None:
            return
        targets = dict(command.moves)
        for work in placed.instance.drain():
            if command.kv == "copy" and work.produced:
                self._copy_kv(placed, work, targets[work.request_id])
            else:
                self._resume(targets[work.request_id], work, cached=False)

    def _resume(self, target: int, work: BatchedRequest, *, cached: bool) -> None:
        if target in self._placed:
            moved = BatchedRequest(work.request_id, work.prompt_tokens, work.output_tokens, work.produced, cached)
            self._placed[target].instance.resume([moved])

    def _copy_kv(self, pipeline: _Placed, work: BatchedRequest, target: int) -> None:
        """Fetch the KV of the layers the target never ran from the stages that did; go on when all of it is there."""
        if target not in self._placed:
            return
        (home,) = self._placed[target].nodes
        kv_bytes = (work.context_tokens - 1) * self._models[pipeline.model].kv_bytes_per_token
        missing = [(node, share * kv_bytes) for node, share in pipeline.instance.stages if node != home]
        left = len(missing)

        def arrived() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._resume(target, work, cached=True)

        for node, size_bytes in missing:
            self._transfers.copy(node, home, size_bytes, arrived)

    # -- what happens in the cluster ---------------------------------------------------------------------------------

    def _block_arrived(self, transfer_id: int, node: NodeId, model: str, block: int) -> None:
        self._events.append(BlockArrived(self.kernel.now, transfer_id, node, model, block))

    def _occupy(self, node: NodeId, busy: bool) -> None:
        """A collective takes the node's GPUs or gives them back; all instances there feel the first and the last."""
        before = self._occupied.get(node, 0)
        after = self._occupied[node] = before + (1 if busy else -1)
        if bool(before) != bool(after):
            for placed in self._placed.values():
                if node in placed.nodes:
                    placed.instance.occupy(busy)

    def _lose_node(self, node: NodeId) -> None:
        self._lost.add(node)
        self._transfers.node_lost(node)
        for instance_id in [i for i, placed in self._placed.items() if node in placed.nodes]:
            self._placed.pop(instance_id).instance.drain()
        self._events.append(NodeLost(self.kernel.now, node))
