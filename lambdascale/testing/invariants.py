"""Observer that asserts what holds for every system, whatever its policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from lambdascale.core import ClusterSpec, NodeId, Request, Stage
from lambdascale.core.commands import (
    AllocateNode,
    CancelTransfer,
    Command,
    Dispatch,
    EvictBlocks,
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
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    Event,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    TimerFired,
    TokensProduced,
)
from lambdascale.multicast import validate_plan


class Named(str):
    """The message of an assertion, with the ``name`` of the invariant that does not hold."""

    name: str

    def __new__(cls, name: str, case: str) -> Named:
        """Make the message of the invariant ``name``."""
        message = super().__new__(cls, case)
        message.name = name
        return message


@dataclass(slots=True)
class _Transfer:
    """A multicast or load under way: (node, block) pairs it has yet to bring, its nodes, and the host copies it reads from.

    ``tries``: number of failed multicasts it makes up for.
    """

    model: str
    left: set[tuple[NodeId, int]]
    members: frozenset[NodeId]
    copies: frozenset[NodeId]
    tries: int = 0


class InvariantChecker:
    """Observer of a run that asserts after every step; call ``finish()`` at the end.

    GPUs are never over-allocated; a replica or stage runs only blocks its node holds; plans are valid for what their nodes hold;
    requests go to instances in service only; every request is answered exactly once or given up; time never goes back. A node is
    not released, nor a host copy evicted, while a transfer lists it. A failed multicast is planned anew once: what fails then is
    loaded. With ``desired`` (replicas wanted for so many queued and running requests: the autoscaler's), a timer takes no replica
    from a model that needs it, and those that still load do not count. With ``max_batch``, an instance never has more requests
    than that for each of its GPUs. Every request fits the KV memory of its instance up to its limit, and nobody is told where
    its answer ends.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        blocks: int,
        *,
        desired: Callable[[int, int], int] | None = None,
        max_batch: int | None = None,
    ) -> None:
        self._blocks = blocks
        self._desired = desired
        self._max_batch = max_batch
        self._gpus_of: dict[tuple[NodeId, str], int] = {}
        self._event: Event | None = None
        self._transfers: dict[int, _Transfer] = {}
        self._cancelled: dict[int, _Transfer] = {}
        # News of older transfers concerns an allocation that has ended; see Allocation.
        self._last_transfer = -1
        self._since: dict[tuple[NodeId, str], int] = {}
        self._model_of: dict[int, str] = {}
        self._open: defaultdict[str, set[int]] = defaultdict(set)
        self._needed: dict[int, int] = {}
        self._kv_tokens: dict[int, int] = {}
        self._running: dict[int, int] = {}
        self._at = 0.0
        self._events_left = 1_000_000
        self._cluster = cluster
        self._gpus: dict[NodeId, int] = {}
        self._held: dict[tuple[NodeId, str], set[int]] = {}
        self._instances: dict[int, tuple[NodeId, ...]] = {}
        self._models_of: dict[int, str] = {}
        self._used: set[int] = set()
        self._arrived: dict[int, float] = {}
        self._dispatched: dict[int, float] = {}
        self.finished: dict[int, int] = {}
        self.failed: set[int] = set()
        self.first_modes: dict[int, str] = {}

    def on_event(self, event: Event) -> None:
        """Check an event against what happened before."""
        assert event.at >= self._at, Named("time", f"time goes back from {self._at} to {event.at}")
        self._at, self._event, self._cancelled = event.at, event, {}
        self._events_left -= 1
        assert self._events_left, Named("ends", "the run does not end")
        if isinstance(event, NodeJoined):
            self._lose(event.node)
            self._gpus[event.node] = self._cluster.node(event.node).gpus
        elif isinstance(event, RequestArrived):
            self._arrived[event.request.request_id] = event.at
            assert type(event.request) is Request, Named("blind", f"{event.request} tells more than a client can")
            self._model_of[event.request.request_id] = event.request.model
            self._open[event.request.model].add(event.request.request_id)
            self._needed[event.request.request_id] = event.request.kv_tokens
        elif isinstance(event, BlockArrived):
            if event.node in self._gpus and event.transfer_id > self._since.get((event.node, event.model), -1):
                held = self._held.setdefault((event.node, event.model), set())
                assert event.block not in held, Named(
                    "blocks once", f"block {event.block} of {event.model} reaches node {event.node} twice"
                )
                held.add(event.block)
                self._brought(event)
        elif isinstance(event, TokensProduced):
            assert event.at >= self._dispatched[event.request_id], Named("request order", "tokens before dispatch")
            self.first_modes.setdefault(event.request_id, event.mode)
        elif isinstance(event, RequestFinished):
            assert event.request_id not in self.finished, Named("finished once", f"request {event.request_id} is answered twice")
            self.finished[event.request_id] = event.tokens
            self._open[self._model_of[event.request_id]].discard(event.request_id)
            self._running.pop(event.request_id, None)
        elif isinstance(event, NodeLost):
            self._lose(event.node)

    def _lose(self, node: NodeId) -> None:
        """Forget a node: lost, or back without anything it held before."""
        self._gpus.pop(node, None)
        self._held = {key: blocks for key, blocks in self._held.items() if key[0] != node}

    def on_command(self, at: float, command: Command) -> None:
        """Check a command against the state of the cluster."""
        assert at == self._at, Named("time", "commands are given at the time of their event")
        if isinstance(command, AllocateNode):
            self._gpus[command.node] -= command.gpus
            assert self._gpus[command.node] >= 0, Named("GPUs", f"node {command.node} is over-allocated")
            self._held[command.node, command.model] = set()
            self._since[command.node, command.model] = self._last_transfer
            self._gpus_of[command.node, command.model] = command.gpus
        elif isinstance(command, ReleaseNode):
            self._gpus[command.node] += command.gpus
            self._check_release(command)
            del self._held[command.node, command.model]
        elif isinstance(command, EvictBlocks):
            reading = [n for n, t in self._transfers.items() if t.model == command.model and command.node in t.copies]
            assert command.tier != "host" or not reading, Named(
                "feeding", f"node {command.node}'s copy is evicted while transfers {reading} read it"
            )
        elif isinstance(command, CancelTransfer):
            if command.transfer_id in self._transfers:
                self._cancelled[command.transfer_id] = self._transfers.pop(command.transfer_id)
        elif isinstance(command, SetTimer):
            assert command.at >= at, Named("time", "a timer in the past")
        elif isinstance(command, FailRequest):
            self.failed.add(command.request_id)
            self._open[self._model_of[command.request_id]].discard(command.request_id)
            self._running.pop(command.request_id, None)
        elif isinstance(command, StartMulticast | LoadBlocks):
            self._check_transfer(command)
        else:
            self._check_serving(command)

    def _serving(self, model: str) -> list[tuple[NodeId, ...]]:
        return [nodes for instance, nodes in self._instances.items() if self._models_of[instance] == model]

    def held(self, node: NodeId, model: str) -> set[int]:
        """Return the blocks of ``model`` that ``node`` holds in GPU memory."""
        return set(self._held.get((node, model), ()))

    def open_requests(self, model: str) -> set[int]:
        """Return the requests of ``model`` that arrived and have neither been answered nor failed."""
        return self._open[model]

    def _brought(self, event: BlockArrived) -> None:
        """Strike a block from every transfer that was to bring it; forget transfers that have nothing left to bring."""
        for number, transfer in list(self._transfers.items()):
            if transfer.model == event.model:
                transfer.left.discard((event.node, event.block))
                if not transfer.left:
                    del self._transfers[number]

    def _check_release(self, command: ReleaseNode) -> None:
        node, model = command.node, command.model
        assert not any(node in nodes for nodes in self._serving(model)), Named("released serving", "released while serving")
        reading = [n for n, t in self._transfers.items() if t.model == model and node in t.members - t.copies]
        assert not reading, Named("feeding", f"node {node} is released while transfers {reading} list it")
        if self._desired is not None and isinstance(self._event, TimerFired) and not self._first_replica_waits():
            left = sum(name == model for _, name in self._held) - 1
            open_requests = self._open[model]
            if not open_requests and any(requests - self._running.keys() for requests in self._open.values()):
                return  # what is idle gives way to requests that wait
            running = len(open_requests & set(self._running))
            wanted = self._desired(len(open_requests) - running, running)
            assert left >= wanted, Named("replicas kept", f"{model} keeps {left} replicas, it needs {wanted}")
            serving = len({other for nodes in self._serving(model) for other in nodes})
            assert serving >= wanted, Named("replicas kept", f"{model} keeps {serving} nodes that serve, it needs {wanted}")

    def _first_replica_waits(self) -> bool:
        """True if a model has requests and no node: it comes before what others have idle."""
        ended, served = self.failed.union(self.finished), {model for _, model in self._held}
        return any(request not in ended and model not in served for request, model in self._model_of.items())

    def _check_transfer(self, command: StartMulticast | LoadBlocks) -> None:
        self._check_source(command)
        self._last_transfer = max(self._last_transfer, command.transfer_id)
        self._transfers[command.transfer_id] = self._as_transfer(command)

    def _as_transfer(self, command: StartMulticast | LoadBlocks) -> _Transfer:
        if isinstance(command, LoadBlocks):
            left = {(command.node, block) for block in command.blocks}
            members = frozenset({command.node})
            return _Transfer(command.model, left, members, members if command.tier == "host" else frozenset())
        plan = command.plan
        copies = {node for node, tier in zip(plan.sources, command.source_tiers, strict=True) if tier == "host"}
        left = {(send.dst, send.block) for sends in plan.rounds for send in sends}
        cancelled = [(n, t) for n, t in self._cancelled.items() if t.model == command.model]
        again = {n: t.tries for n, t in cancelled if {node for node, _ in t.left}.issuperset(plan.destinations)}
        # One that was called off because a node that fed it was given up has not failed itself.
        failed = isinstance(self._event, CommandFailed) and self._event.transfer_id in again
        tries = max(again.values(), default=0) + failed
        assert tries <= 1, Named(
            "planned anew once", f"transfer {command.transfer_id} is the second new plan for a failed multicast"
        )
        return _Transfer(command.model, left, frozenset(plan.members), frozenset(copies), tries)

    def _check_source(self, command: StartMulticast | LoadBlocks) -> None:
        if isinstance(command, LoadBlocks):
            assert (command.node, command.model) in self._held, Named("GPUs", f"node {command.node} loads without GPUs")
            return
        plan = command.plan
        assert all((node, command.model) in self._held for node in plan.destinations), Named("GPUs", "a destination has no GPUs")
        holdings = {node: set(self._held.get((node, command.model), ())) for node in plan.members}
        for node, tier in zip(plan.sources, command.source_tiers, strict=True):
            if tier == "host":
                holdings[node] = set(range(plan.blocks))
            else:  # a source may pass on what other transfers still bring it
                coming = (t.left for t in self._transfers.values() if t.model == command.model)
                holdings[node] |= {block for left in coming for receiver, block in left if receiver == node}
        validate_plan(plan, holdings=holdings)

    def _check_serving(self, command: Command) -> None:
        if isinstance(command, Serve):
            assert command.instance not in self._used, Named("instances", f"instance id {command.instance} is used again")
            self._used.add(command.instance)
            self._models_of[command.instance] = command.model
            self._kv_tokens[command.instance] = command.kv_tokens
            self._check_stages(command.instance, command.stages)
        elif isinstance(command, Repartition):
            assert command.instance in self._instances, Named(
                "instances", f"instance {command.instance} is reshaped, which is not in service"
            )
            self._kv_tokens[command.instance] = command.kv_tokens
            self._check_stages(command.instance, command.stages)
            self._check_room(command.instance)
        elif isinstance(command, Dispatch):
            assert command.instance in self._instances, Named(
                "instances", f"dispatch to instance {command.instance}, which is not in service"
            )
            for request in command.requests:
                assert request.request_id in self._arrived, Named("request order", "dispatched before it arrived")
                assert request.request_id not in self.finished, Named("finished once", "dispatched after it was answered")
                self._dispatched[request.request_id] = self._at
                self._running[request.request_id] = command.instance
            self._check_capacity(command.instance)
            self._check_room(command.instance)
        elif isinstance(command, SwitchMode):
            del self._instances[command.pipeline]
            assert all(target in self._instances for _, target in command.moves), Named(
                "instances", "moved to an instance out of service"
            )
            self._running |= dict(command.moves)
            for target in {target for _, target in command.moves}:
                self._check_room(target)
        elif isinstance(command, StopInstance):
            del self._instances[command.instance]
            self._running = {request: instance for request, instance in self._running.items() if instance != command.instance}

    def _check_capacity(self, instance: int) -> None:
        if self._max_batch is not None:
            requests = sum(at == instance for at in self._running.values())
            model = self._models_of[instance]
            room = self._max_batch * sum(self._gpus_of[node, model] for node in set(self._instances[instance]))
            assert requests <= room, Named("capacity", f"instance {instance} has room for {room} requests, it gets {requests}")

    def _check_room(self, instance: int) -> None:
        room = self._kv_tokens[instance]
        large = [r for r, at in self._running.items() if at == instance and self._needed[r] > room]
        assert not large, Named(
            "KV memory", f"instance {instance} has {room} tokens of KV memory, requests {large} may need more"
        )

    def _check_stages(self, instance: int, stages: tuple[Stage, ...]) -> None:
        model = self._models_of[instance]
        self._instances[instance] = tuple(dict.fromkeys(stage.node for stage in stages))
        covered = [block for stage in stages for block in range(stage.first_block, stage.last_block + 1)]
        assert covered == list(range(self._blocks)), Named(
            "stages", f"the stages of instance {instance} do not cover the model once: {stages}"
        )
        for stage in stages:
            needed = set(range(stage.first_block, stage.last_block + 1))
            assert needed <= self._held[stage.node, model], Named("held", f"node {stage.node} lacks blocks of its stage")

    def finish(self) -> None:
        """Assert that every request that arrived was answered or failed, and none both."""
        both = self.failed & set(self.finished)
        assert not both, Named("finished once", f"requests {sorted(both)} are answered and failed")
        lost = set(self._arrived) - self.failed - set(self.finished)
        assert not lost, Named("none lost", f"requests {sorted(lost)} are neither answered nor failed")
        unknown = (self.failed | set(self.finished)) - set(self._arrived)
        assert not unknown, Named("none lost", f"requests {sorted(unknown)} end that never arrived")
