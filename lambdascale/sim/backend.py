"""SimBackend: the simulated cluster behind the control plane's Backend protocol. Deterministic for a seed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import numpy as np

from lambdascale.control.batching import BatchedRequest, BatchLimits
from lambdascale.core import ClusterSpec, ModelSpec, NodeId, NodeSpec, Request, TracedRequest
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
    Repartition,
    Serve,
    SetTimer,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    Event,
    NodeJoined,
    NodeLost,
    RequestArrived,
    SetUpDone,
    TimerFired,
)
from lambdascale.core.timing import ComputeModel
from lambdascale.core.token_gaps import TokenGaps
from lambdascale.sim.batches import Surroundings
from lambdascale.sim.instances import SimInstance
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.options import TransferOptions
from lambdascale.sim.port import ComputePort
from lambdascale.sim.processes import PatientTransfers, Pool, Processes, WarmPool
from lambdascale.sim.sharing import DisturbedPace, SharedCores
from lambdascale.sim.timed_instances import TimedInstance
from lambdascale.sim.token_log import TokenLog
from lambdascale.sim.transfers import TransferEngine


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """The simulated cluster. ``transfers``: how data moves. ``pool``: which allocations find a process that runs.

    ``node_failures``: (node, time in seconds) pairs.

    ``slow_nodes``: (node, share) pairs; such a node's NIC has that share of the cluster's rate, unknown to the control plane.
    ``unforeseen_slowdown``: every iteration takes so many times as long as the control plane reckons; below 1, it is faster.
    """

    transfers: TransferOptions = field(default_factory=TransferOptions)
    pool: Pool = field(default_factory=WarmPool)
    node_failures: tuple[tuple[int, float], ...] = ()
    slow_nodes: tuple[tuple[int, float], ...] = ()
    unforeseen_slowdown: float = 1.0

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("node_failures", "slow_nodes"):
            object.__setattr__(self, name, tuple(tuple(pair) for pair in getattr(self, name)))
        check_types(self)
        slowdown = self.unforeseen_slowdown
        require(slowdown > 0, f"backend.unforeseen_slowdown must be positive, not {slowdown!r}")
        for failure in self.node_failures:
            require(len(failure) == 2 and failure[1] >= 0, f"backend.node_failures takes [node, time] pairs, not {failure!r}")
        for slow in self.slow_nodes:
            require(len(slow) == 2 and 0 < slow[1] <= 1, f"backend.slow_nodes takes [node, share up to 1] pairs, not {slow!r}")

    @property
    def label(self) -> str:
        """Name of the backend in rows and summaries."""
        return "sim"

    def build(
        self,
        *,
        cluster: ClusterSpec,
        models: Sequence[ModelSpec],
        requests: Sequence[TracedRequest],
        batching: BatchLimits,
        seed: int,
        token_times: bool = False,
    ) -> SimBackend:
        """Return the backend of one run; ``token_times``: it keeps what the gaps between tokens follow from."""
        for name in ("node_failures", "slow_nodes"):
            for node, _ in getattr(self, name):
                require(0 <= node < cluster.nodes, f"backend.{name} names node {node}, the cluster has 0 to {cluster.nodes - 1}")
        return SimBackend(
            config=self,
            cluster=cluster,
            models=models,
            requests=requests,
            batching=batching,
            seed=seed,
            token_times=token_times,
        )


class SimBackend:
    """Carries commands out in simulated time and feeds the trace in as it goes."""

    def __init__(
        self,
        *,
        config: SimConfig,
        cluster: ClusterSpec,
        models: Sequence[ModelSpec],
        requests: Sequence[TracedRequest],
        batching: BatchLimits,
        seed: int,
        token_times: bool = False,
    ) -> None:
        self._cluster = cluster
        self._slowdown = config.unforeseen_slowdown
        self._limits = batching
        self._models = {model.name: model for model in models}
        self._compute: dict[tuple[NodeSpec, str], ComputeModel] = {}
        self._timings: dict[tuple[NodeId, str], ComputeModel] = {}
        self._ports: dict[NodeId, dict[str, ComputePort]] = {node: {} for node in range(cluster.nodes)}
        self._taken = Counter[NodeId]()  # by collectives
        self.kernel = Kernel()
        slowdown = cluster.compute.shared_slowdown
        self._cores = SharedCores(slowdown) if slowdown else None
        # Of nodes whose iterations multicasts may slow: only there if the options say that they do.
        paces = {node: DisturbedPace(self._cores) for node in range(cluster.nodes)} if config.transfers.slows else None
        self._paces = paces
        self._events: deque[Event] = deque(NodeJoined(0.0, node) for node in range(cluster.nodes))
        # Where answers end: known here and nowhere in the control plane.
        self._answer_tokens = {each.request.request_id: each.answer_tokens for each in requests}
        self._requests = (each.request for each in requests)
        self._arriving = self._first = next(self._requests, None)
        self._arrives_s = inf if self._arriving is None else self._arriving.arrival_s
        self._instances: dict[int, SimInstance] = {}
        self._surroundings: dict[tuple[str, tuple[int, ...]], Surroundings] = {}  # of a model cut into such blocks
        self._tokens = TokenLog() if token_times else None
        self._model_of: dict[int, str] = {}
        self._lost: set[NodeId] = set()
        self._processes = config.pool.build(cluster, models)
        engine = TransferEngine if self._processes is None else partial(PatientTransfers, self._processes)
        self._transfers = engine(
            self.kernel,
            cluster,
            config.transfers,
            np.random.default_rng(seed),
            self._block_arrived,
            self._occupy,
            set_up=self._set_up,
            layers={model.name: model.layers for model in models},
            nic_shares=dict(config.slow_nodes),
            disturb=None if paces is None else lambda node, slowdown, begins: paces[node].disturb(slowdown, begins),
        )
        for node, at in config.node_failures:
            self.kernel.at(at, self._lose_node, node)
        self._handlers: dict[type[Command], Callable[[Any], None]] = {
            AllocateNode: self._nothing if self._processes is None else self._allocate,
            ReleaseNode: self._release,
            PlaceCopy: self._nothing,
            EvictBlocks: self._nothing,
            FailRequest: self._nothing,
            StartMulticast: self._transfers.multicast,
            LoadBlocks: self._transfers.load,
            CancelTransfer: self._cancel,
            Serve: self._serve,
            Repartition: self._repartition,
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
        """Return the next event; requests arrive before anything else that happens at the same time."""
        events = self._events
        if events or self.kernel.advance(self._arrives_s, events):
            return events.popleft()
        arriving = self._arriving
        return None if arriving is None else self._arrive(arriving)

    def _arrive(self, request: Request) -> RequestArrived:
        self._arriving = following = next(self._requests, None)
        self._arrives_s = inf if following is None else following.arrival_s
        self.kernel.now = at = request.arrival_s
        return RequestArrived(at, request)

    def token_gaps(self) -> TokenGaps | None:
        """Gaps between the tokens of each request that was answered; None unless they were asked for."""
        return None if self._tokens is None else self._tokens.gaps()

    # -- commands ----------------------------------------------------------------------------------------------------

    def _nothing(self, command: Command) -> None:
        """Ignore bookkeeping of the control plane: it takes no time and changes nothing here."""

    def _allocate(self, command: AllocateNode) -> None:
        """Start a process; what a run begins with, before the first request, runs already."""
        assert self._processes is not None, "the handler of runs with a pool that starts processes"
        running = self._arriving is self._first
        self._processes.allocate(self.kernel.now, command.node, command.model, running=running)

    def _release(self, command: ReleaseNode) -> None:
        self._transfers.released(command.node, command.model)
        if self._processes is not None:
            self._processes.release(self.kernel.now, command.node, command.model)

    def _cancel(self, command: CancelTransfer) -> None:
        self._transfers.cancel(command.transfer_id)

    def _set_timer(self, command: SetTimer) -> None:
        self.kernel.at(command.at, self._events.append, TimerFired(command.at, command.timer_id))

    def _serve(self, command: Serve) -> None:
        if self._lost.isdisjoint(stage.node for stage in command.stages):
            self._instances[command.instance] = self._instance(command)
            self._model_of[command.instance] = command.model
            if self._processes is not None:
                self._use(self._processes, command)

    def _use(self, processes: Processes, command: Serve) -> None:
        """Let the first iteration in a new process take longer: the node computes nothing else meanwhile."""
        for node in {stage.node: None for stage in command.stages}:
            if processes.first_use(node, command.model):
                port = self._port(self._models[command.model], node)
                port.occupy(True)
                self.kernel.at(self.kernel.now + processes.first_iteration_s, port.occupy, False)

    def _instance(self, command: Serve) -> SimInstance:
        around = self._surroundings.get((command.model, command.block_bytes))
        if around is None:
            around = self._surroundings[command.model, command.block_bytes] = self._around(command)
        if self._tokens is None:
            return SimInstance(command.instance, command.stages, command.kv_tokens, around)
        return TimedInstance(command.instance, command.stages, command.kv_tokens, around, self._tokens)

    def _around(self, command: Serve) -> Surroundings:
        model = self._models[command.model]
        return Surroundings(
            kernel=self.kernel,
            port=partial(self._port, model),
            timing=partial(self._timing, model),
            emit=self._events.append,
            copy_kv=self._transfers.copy,
            limits=self._limits,
            batches=model.gpus_per_replica,
            kv_bytes_per_token=model.kv_bytes_per_token,
            hop_s=self._cluster.hop_latency_s,
            block_bytes=command.block_bytes,
        )

    def _port(self, model: ModelSpec, node: NodeId) -> ComputePort:
        """Models on a node of several GPUs have each their own; on a node of one GPU they take turns at it."""
        name = model.name if self._cluster.node(node).gpus > 1 else ""
        ports = self._ports[node]
        if name not in ports:
            pace = self._cores if self._paces is None else self._paces[node]
            ports[name] = ComputePort(self.kernel, pace, model.gpus_per_replica)
            for _ in range(self._taken[node]):
                ports[name].occupy(True)
        return ports[name]

    def _timing(self, model: ModelSpec, node: NodeId) -> ComputeModel:
        """Nodes of one kind share a compute model."""
        timing = self._timings.get((node, model.name))
        if timing is None:
            kind = self._cluster.node(node), model.name
            if kind not in self._compute:
                self._compute[kind] = ComputeModel(kind[0], model, self._slowdown)
            timing = self._timings[node, model.name] = self._compute[kind]
        return timing

    def _dispatch(self, command: Dispatch) -> None:
        # An instance may be lost before the control plane has seen the event; it restarts the requests when it does.
        instance = self._instances.get(command.instance)
        if instance is not None:
            # A request that is not of the workload's is answered up to its limit.
            ends = self._answer_tokens
            instance.take(
                [BatchedRequest(r.request_id, r.prompt_tokens, ends.get(r.request_id, r.max_tokens)) for r in command.requests]
            )

    def _repartition(self, command: Repartition) -> None:
        instance = self._instances.get(command.instance)
        if instance is not None and self._lost.isdisjoint(stage.node for stage in command.stages):
            instance.repartition(command.stages, command.kv, command.kv_tokens)

    def _stop_instance(self, command: StopInstance) -> None:
        instance = self._instances.pop(command.instance, None)
        if instance is not None:
            instance.drain()

    def _switch_mode(self, command: SwitchMode) -> None:
        pipeline = self._instances.pop(command.pipeline, None)
        if pipeline is None:
            return
        targets = dict(command.moves)
        for work in pipeline.drain():
            if command.kv == "copy" and work.produced:
                self._copy_kv(pipeline, work, targets[work.request_id])
            else:
                self._resume(targets[work.request_id], work, cached=False)

    def _resume(self, target: int, work: BatchedRequest, *, cached: bool) -> None:
        if target in self._instances:
            moved = BatchedRequest(work.request_id, work.prompt_tokens, work.output_tokens, work.produced, cached)
            self._instances[target].take([moved])

    def _copy_kv(self, pipeline: SimInstance, work: BatchedRequest, target: int) -> None:
        """Fetch the KV of the layers the target never ran from the stages that did; go on when all of it has arrived."""
        if target not in self._instances:
            return
        home, *others = self._instances[target].nodes
        if others:  # a pipeline, whose nodes each need other layers: they compute them
            self._resume(target, work, cached=False)
            return
        kv_bytes = (work.context_tokens - 1) * self._models[self._model_of[target]].kv_bytes_per_token
        missing = [(node, share * kv_bytes) for node, share in pipeline.shares if node != home]
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

    def _set_up(self, transfer_id: int, node: NodeId) -> None:
        self._events.append(SetUpDone(self.kernel.now, transfer_id, node))

    def _occupy(self, node: NodeId, busy: bool) -> None:
        """A collective takes the node's GPUs or gives them back."""
        self._taken[node] += 1 if busy else -1
        for port in self._ports[node].values():
            port.occupy(busy)

    def _lose_node(self, node: NodeId) -> None:
        self._lost.add(node)
        self._transfers.lost(node)
        if self._processes is not None:
            self._processes.lost(node)
        self._events.append(NodeLost(self.kernel.now, node))
        for number, instance in list(self._instances.items()):
            if instance.involves(node):
                del self._instances[number]
                instance.drain()
                if node not in instance.nodes:  # the control plane does not know that it still depended on the node
                    reason = f"node {node} is lost, and an iteration or KV of instance {number} was still on it"
                    self._events.append(CommandFailed(self.kernel.now, "Repartition", reason, instance=number))
