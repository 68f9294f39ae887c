"""An observer that knows what no system may do, whatever its policy."""

from __future__ import annotations

from lambdascale.core import ClusterSpec, NodeId, Stage
from lambdascale.core.commands import (
    AllocateNode,
    Command,
    Dispatch,
    FailRequest,
    LoadBlocks,
    ReleaseNode,
    Repartition,
    Serve,
    SetTimer,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import BlockArrived, Event, NodeLost, RequestArrived, RequestFinished, TokensProduced
from lambdascale.multicast import validate_plan


class InvariantChecker:
    """Watches a run and asserts after every step; call ``finish()`` at the end.

    GPUs are never over-allocated; a replica or stage runs only blocks its node holds; plans are valid for what their nodes hold;
    requests go to instances in service only; every request is answered exactly once or given up; time never goes back.
    """

    def __init__(self, cluster: ClusterSpec, blocks: int) -> None:
        self._blocks = blocks
        self._at = 0.0
        self._events_left = 1_000_000
        self._gpus = dict.fromkeys(range(cluster.nodes), cluster.gpus_per_node)
        self._held: dict[tuple[NodeId, str], set[int]] = {}
        self._instances: dict[int, tuple[NodeId, ...]] = {}
        self._models_of: dict[int, str] = {}
        self._gone: set[int] = set()
        self._arrived: dict[int, float] = {}
        self._dispatched: dict[int, float] = {}
        self.finished: dict[int, int] = {}
        self.failed: set[int] = set()
        self.first_modes: dict[int, str] = {}

    def on_event(self, event: Event) -> None:
        """Check an event against what happened before."""
        assert event.at >= self._at, f"time goes back from {self._at} to {event.at}"
        self._at = event.at
        self._events_left -= 1
        assert self._events_left, "the run does not end"
        if isinstance(event, RequestArrived):
            self._arrived[event.request.request_id] = event.at
        elif isinstance(event, BlockArrived):
            if event.node in self._gpus:
                held = self._held.setdefault((event.node, event.model), set())
                assert event.block not in held, f"block {event.block} of {event.model} reaches node {event.node} twice"
                held.add(event.block)
        elif isinstance(event, TokensProduced):
            assert event.at >= self._dispatched[event.request_id], "tokens before dispatch"
            self.first_modes.setdefault(event.request_id, event.mode)
        elif isinstance(event, RequestFinished):
            assert event.request_id not in self.finished, f"request {event.request_id} is answered twice"
            self.finished[event.request_id] = event.tokens
        elif isinstance(event, NodeLost):
            self._gpus.pop(event.node)
            self._held = {key: blocks for key, blocks in self._held.items() if key[0] != event.node}

    def on_command(self, at: float, command: Command) -> None:
        """Check a command against the state of the cluster."""
        assert at == self._at, "commands are given at the time of their event"
        if isinstance(command, AllocateNode):
            self._gpus[command.node] -= command.gpus
            assert self._gpus[command.node] >= 0, f"node {command.node} is over-allocated"
            self._held[command.node, command.model] = set()
        elif isinstance(command, ReleaseNode):
            self._gpus[command.node] += command.gpus
            assert not any(command.node in nodes for nodes in self._serving(command.model)), "released while serving"
            del self._held[command.node, command.model]
        elif isinstance(command, SetTimer):
            assert command.at >= at, "a timer in the past"
        elif isinstance(command, FailRequest):
            self.failed.add(command.request_id)
        elif isinstance(command, StartMulticast | LoadBlocks):
            self._check_transfer(command)
        else:
            self._check_serving(command)

    def _serving(self, model: str) -> list[tuple[NodeId, ...]]:
        return [nodes for instance, nodes in self._instances.items() if self._models_of[instance] == model]

    def _check_transfer(self, command: StartMulticast | LoadBlocks) -> None:
        if isinstance(command, LoadBlocks):
            assert (command.node, command.model) in self._held, f"node {command.node} loads without GPUs"
            return
        plan = command.plan
        assert all((node, command.model) in self._held for node in plan.destinations), "a destination has no GPUs"
        holdings = {node: set(self._held.get((node, command.model), ())) for node in plan.members}
        for node, tier in zip(plan.sources, command.source_tiers, strict=True):
            if tier == "host":
                holdings[node] = set(range(plan.blocks))
        validate_plan(plan, holdings=holdings)

    def _check_serving(self, command: Command) -> None:
        if isinstance(command, Serve):
            assert command.instance not in self._gone, f"instance id {command.instance} is used again"
            self._gone.add(command.instance)
            self._models_of[command.instance] = command.model
            self._check_stages(command.instance, command.stages)
        elif isinstance(command, Repartition):
            assert command.instance in self._instances, f"instance {command.instance} is reshaped, which is not in service"
            self._check_stages(command.instance, command.stages)
        elif isinstance(command, Dispatch):
            assert command.instance in self._instances, f"dispatch to instance {command.instance}, which is not in service"
            for request in command.requests:
                assert request.request_id in self._arrived, "dispatched before it arrived"
                assert request.request_id not in self.finished, "dispatched after it was answered"
                self._dispatched[request.request_id] = self._at
        elif isinstance(command, SwitchMode):
            del self._instances[command.pipeline]
            assert all(target in self._instances for _, target in command.moves), "moved to an instance out of service"
        elif isinstance(command, StopInstance):
            del self._instances[command.instance]

    def _check_stages(self, instance: int, stages: tuple[Stage, ...]) -> None:
        model = self._models_of[instance]
        self._instances[instance] = tuple(dict.fromkeys(stage.node for stage in stages))
        covered = [block for stage in stages for block in range(stage.first_block, stage.last_block + 1)]
        assert covered == list(range(self._blocks)), f"the stages of instance {instance} do not cover the model once: {stages}"
        for stage in stages:
            needed = set(range(stage.first_block, stage.last_block + 1))
            assert needed <= self._held[stage.node, model], f"node {stage.node} lacks blocks of its stage"

    def finish(self) -> None:
        """Every request that arrived is accounted for, with all its tokens."""
        assert self.failed.isdisjoint(self.finished)
        assert self.failed | set(self.finished) == set(self._arrived)
