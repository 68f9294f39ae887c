"""The cluster as it is now, for people and monitoring: an observer of events and commands, read from other threads."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lambdascale.core import NodeId
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
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    Event,
    NodeGivenUp,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    TokensProduced,
)

_RECENT = 200  # answers that the quantiles of the view are taken over
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class _Node:
    """``returning``: lost, and to be started again."""

    alive: bool = True
    returning: bool = False
    models: dict[str, int] = field(default_factory=dict)  # GPUs allocated to each
    blocks: dict[str, set[int]] = field(default_factory=dict)
    host_copies: set[str] = field(default_factory=set)


@dataclass
class _Transfer:
    model: str
    kind: str
    sources: tuple[NodeId, ...]
    missing: set[tuple[NodeId, int]]
    total: int


@dataclass
class _Instance:
    model: str
    stages: tuple[tuple[NodeId, int, int], ...]
    pipeline: bool
    running: set[int] = field(default_factory=set)


@dataclass
class Counts:
    """Totals since the start."""

    arrived: int = 0
    finished: int = 0
    failed: int = 0
    restarts: int = 0
    tokens: int = 0
    scale_outs: int = 0
    nodes_lost: int = 0
    nodes_restarted: int = 0
    from_pipelines: int = 0
    gpu_seconds: float = 0.0


@dataclass
class _Asked:
    """A request that has neither ended nor failed. ``arrived``: None once its first token has come."""

    arrived: float | None
    dispatched: bool = False


@dataclass(frozen=True)
class Readings:
    """All that monitoring shows, of one moment. ``ttft_counts`` belong to the buckets of TTFT_BUCKETS_S and beyond."""

    snapshot: dict[str, Any]
    counts: Counts
    ttft_counts: tuple[int, ...]
    ttft_sum: float


class ClusterState:
    """Observe a run; ``snapshot()`` is what /cluster shows. ``blocks``: of each model.

    A lock guards all of it: the control thread writes, others read. Requests and transfers are forgotten when they end.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()  # guards all below: what is read in one hold is of one moment
        self._at = 0.0
        self._gpus = 0
        self._nodes: dict[NodeId, _Node] = {}
        self._instances: dict[int, _Instance] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._requests: dict[int, _Asked] = {}
        self._queued: set[int] = set()
        self._ttft: deque[float] = deque(maxlen=_RECENT)
        self._ttft_counts = [0] * (len(TTFT_BUCKETS_S) + 1)
        self._ttft_sum = 0.0
        self._counts = Counts()

    # -- Observer ----------------------------------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Take note of what happened."""
        with self._lock:
            self._pass_time(event.at)
            self._event(event)

    def on_command(self, at: float, command: Command) -> None:
        """Take note of what was decided."""
        with self._lock:
            self._pass_time(at)
            self._command(command)

    def _pass_time(self, at: float) -> None:
        self._counts.gpu_seconds += self._gpus * (at - self._at)
        self._at = at

    def _event(self, event: Event) -> None:
        if isinstance(event, RequestArrived):
            self._counts.arrived += 1
            self._requests[event.request.request_id] = _Asked(event.request.arrival_s)
            self._queued.add(event.request.request_id)
        elif isinstance(event, BlockArrived):
            self._nodes[event.node].blocks.setdefault(event.model, set()).add(event.block)
            for number, transfer in list(self._transfers.items()):
                if transfer.model == event.model:
                    self._progress(number, {(event.node, event.block)})
        elif isinstance(event, TokensProduced):
            self._first_token(event)
        elif isinstance(event, RequestFinished):
            self._counts.finished += 1
            self._counts.tokens += event.tokens
            self._forget(event.request_id)
        elif isinstance(event, NodeJoined):
            self._counts.nodes_restarted += event.node in self._nodes
            self._nodes[event.node] = _Node()
        elif isinstance(event, NodeLost):
            node = self._nodes[event.node]
            self._gpus -= sum(node.models.values())
            self._nodes[event.node] = _Node(alive=False, returning=event.returns)
            self._counts.nodes_lost += 1
            for number, transfer in list(self._transfers.items()):
                self._progress(number, {pair for pair in transfer.missing if pair[0] == event.node})
        elif isinstance(event, NodeGivenUp):
            self._nodes[event.node].returning = False
        elif isinstance(event, CommandFailed):
            self._transfers.pop(event.transfer_id, None)

    def _first_token(self, event: TokensProduced) -> None:
        asked = self._requests.get(event.request_id)
        if asked is None or asked.arrived is None:
            return
        ttft, asked.arrived = self._at - asked.arrived, None
        self._ttft.append(ttft)
        self._ttft_sum += ttft
        self._ttft_counts[int(np.searchsorted(TTFT_BUCKETS_S, ttft))] += 1
        self._counts.from_pipelines += event.mode == "pipeline"

    def _forget(self, request_id: int) -> None:
        self._queued.discard(request_id)
        self._requests.pop(request_id, None)
        for instance in self._instances.values():
            instance.running.discard(request_id)

    def _progress(self, number: int, pairs: set[tuple[NodeId, int]]) -> None:
        transfer = self._transfers.get(number)
        if transfer is not None:
            transfer.missing -= pairs
            if not transfer.missing:
                del self._transfers[number]

    def _command(self, command: Command) -> None:
        if isinstance(command, Dispatch):
            self._dispatch(command)
        elif isinstance(command, AllocateNode):
            self._gpus += command.gpus
            self._nodes[command.node].models[command.model] = command.gpus
            self._counts.scale_outs += self._at > 0
        elif isinstance(command, ReleaseNode):
            self._gpus -= command.gpus
            node = self._nodes[command.node]
            node.models.pop(command.model, None)
            node.blocks.pop(command.model, None)
            if command.keep_host:
                node.host_copies.add(command.model)
        elif isinstance(command, PlaceCopy):
            self._nodes[command.node].host_copies.add(command.model)
        elif isinstance(command, EvictBlocks):
            self._nodes[command.node].host_copies.discard(command.model)
        elif isinstance(command, FailRequest):
            self._counts.failed += 1
            self._forget(command.request_id)
        elif isinstance(command, StartMulticast | LoadBlocks | CancelTransfer):
            self._transfer(command)
        else:
            self._serve(command)

    def _dispatch(self, command: Dispatch) -> None:
        running = self._instances[command.instance].running
        for request in command.requests:
            asked = self._requests.get(request.request_id)
            if asked is not None:
                self._queued.discard(request.request_id)
                self._counts.restarts += asked.dispatched
                asked.dispatched = True
                running.add(request.request_id)

    def _transfer(self, command: StartMulticast | LoadBlocks | CancelTransfer) -> None:
        if isinstance(command, CancelTransfer):
            self._transfers.pop(command.transfer_id, None)
            return
        if isinstance(command, StartMulticast):
            pairs = {(send.dst, send.block) for sends in command.plan.rounds for send in sends}
            made = _Transfer(command.model, "multicast", command.plan.sources, pairs, len(pairs))
        else:
            pairs = {(command.node, block) for block in command.blocks}
            made = _Transfer(command.model, f"load from {command.tier}", (), pairs, len(pairs))
        if pairs:
            self._transfers[command.transfer_id] = made

    def _serve(self, command: Command) -> None:
        if isinstance(command, Serve):
            stages = tuple((s.node, s.first_block, s.last_block) for s in command.stages)
            self._instances[command.instance] = _Instance(command.model, stages, pipeline=len(stages) > 1)
        elif isinstance(command, Repartition):
            instance = self._instances[command.instance]
            instance.stages = tuple((s.node, s.first_block, s.last_block) for s in command.stages)
            instance.pipeline = len(instance.stages) > 1
        elif isinstance(command, SwitchMode):
            del self._instances[command.pipeline]
            for request_id, target in command.moves:
                if request_id in self._requests:
                    self._instances[target].running.add(request_id)
        elif isinstance(command, StopInstance):
            stopped = self._instances.pop(command.instance, None)
            if stopped is not None:
                self._queued |= stopped.running

    # -- for people --------------------------------------------------------------------------------------------------

    @property
    def nodes_alive(self) -> int:
        """Number of nodes alive."""
        with self._lock:
            return sum(node.alive for node in self._nodes.values())

    @property
    def nodes_returning(self) -> int:
        """Number of lost nodes that will be started again."""
        with self._lock:
            return sum(node.returning for node in self._nodes.values())

    def serves(self, model: str) -> bool:
        """Return True if an instance serves the model."""
        with self._lock:
            return any(instance.model == model for instance in self._instances.values())

    def readings(self) -> Readings:
        """Return all figures of one moment."""
        with self._lock:
            return Readings(self._snapshot(), replace(self._counts), tuple(self._ttft_counts), self._ttft_sum)

    def snapshot(self) -> dict[str, Any]:
        """Return the cluster as plain values: nodes with what they hold, instances, transfers, queue, TTFT."""
        with self._lock:
            return self._snapshot()

    def _snapshot(self) -> dict[str, Any]:
        recent = sorted(self._ttft)
        return {
            "at_s": round(self._at, 3),
            "blocks": self._blocks,
            "nodes": [self._node(number, node) for number, node in sorted(self._nodes.items())],
            "replicas": [
                {"instance": number, "model": i.model, "node": i.stages[0][0], "running": len(i.running)}
                for number, i in self._instances.items()
                if not i.pipeline
            ],
            "pipelines": [
                {
                    "instance": number,
                    "model": i.model,
                    "running": len(i.running),
                    "stages": [{"node": n, "first_block": a, "last_block": b} for n, a, b in i.stages],
                }
                for number, i in self._instances.items()
                if i.pipeline
            ],
            "transfers": [
                {
                    "transfer_id": number,
                    "model": t.model,
                    "kind": t.kind,
                    "sources": t.sources,
                    "arrived": t.total - len(t.missing),
                    "total": t.total,
                }
                for number, t in self._transfers.items()
            ],
            "requests": {
                "queued": len(self._queued),
                "running": sum(len(i.running) for i in self._instances.values()),
                "arrived": self._counts.arrived,
                "finished": self._counts.finished,
                "failed": self._counts.failed,
                "restarts": self._counts.restarts,
                "first_tokens_from_pipelines": self._counts.from_pipelines,
            },
            "ttft_s": {
                "recent": len(recent),
                "p50": recent[len(recent) // 2] if recent else None,
                "p90": recent[len(recent) * 9 // 10] if recent else None,
            },
            "scale_outs": self._counts.scale_outs,
            "node_restarts": self._counts.nodes_restarted,
            "gpu_seconds": round(self._counts.gpu_seconds, 3),
        }

    @staticmethod
    def _node(number: NodeId, node: _Node) -> dict[str, Any]:
        return {
            "node": number,
            "alive": node.alive,
            "returning": node.returning,
            "models": sorted(node.models),
            "gpu_blocks": {model: sorted(blocks) for model, blocks in node.blocks.items()},
            "host_copies": sorted(node.host_copies),
        }
