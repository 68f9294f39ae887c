"""Invariants by name: they hold after every event, for every system and under every fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isclose

from lambdascale.control import Autoscaler, ControlPlane
from lambdascale.control.state import ModelState
from lambdascale.core import NodeId
from lambdascale.core.commands import (
    AllocateNode,
    Command,
    EvictBlocks,
    LoadBlocks,
    PlaceCopy,
    ReleaseNode,
    Repartition,
    Serve,
    StartMulticast,
)
from lambdascale.core.events import BlockArrived, CommandFailed, Event, NodeJoined, NodeLost, RequestFinished, TokensProduced
from lambdascale.explore.cluster import FaultyCluster
from lambdascale.explore.faults import lasts_s
from lambdascale.explore.scenario import Scenario
from lambdascale.metrics.recorder import Recorder
from lambdascale.metrics.tables import gpu_seconds, gpu_usage
from lambdascale.testing.invariants import InvariantChecker, Named

# Bounds: events, and simulated seconds, after which a run counts as one that does not end.
MOST_EVENTS = 30_000
MOST_S = 400.0
# Simulated seconds within which a transfer of a 1 GB model ends or is planned anew where nothing delays it: loads of all
# models from an SSD that they share, several times over.
DEADLINE_S = 40.0
# The promised bound on the failed instances of a request.
_TRIES = 3

# Name of each invariant, and what it says. The first block is checked by lambdascale.testing.InvariantChecker.
INVARIANTS = {
    "time": "times of events and commands never go back",
    "ends": "a run ends: its events and its simulated time are bounded",
    "blind": "nobody is told where an answer ends",
    "blocks once": "a block reaches a node once",
    "request order": "requests arrive, are dispatched, and produce tokens, in this order",
    "finished once": "no request is answered twice, or answered and failed",
    "none lost": "every request that arrived is answered or failed",
    "GPUs": "no GPU is given to two models; loads and multicasts go to nodes with GPUs of the model",
    "feeding": "no node is released and no copy evicted while a transfer reads it",
    "released serving": "no node is released that serves",
    "replicas kept": "a timer takes no replica that the load needs",
    "planned anew once": "a failed multicast is planned anew once; what fails then is loaded",
    "instances": "requests go to instances in service only; ids are used once",
    "capacity": "no instance has more requests than its batches hold",
    "KV memory": "every request fits the KV memory of its instance, up to its limit",
    "stages": "the stages of an instance cover the model once",
    "held": "nothing is served by a node that does not hold it, verified",
    "plans": "every plan brings every block once, from nodes that hold it",
    # Checked here.
    "tokens": "no token is repeated or skipped: one first token, and as many as the answer has",
    "one place": "an open request is in the queue or at one instance, which the cluster knows",
    "retry bound": "a request that was on three failed instances is failed",
    "accounts": "GPUs free and allocated are those of the living nodes, in commands as in the control plane's picture",
    "copies": "no transfer reads a host copy that its node does not have",
    "host bytes": "copies on a node take no more bytes than its budget",
    "deadline": "a transfer ends or is planned anew within a deadline",
    "idle minimum": "an idle cluster returns to its minimum of replicas, and has nothing under way",
    "GPU-seconds": "GPU-seconds of the tables equal those of the allocations",
    "no crash": "the control plane never raises",
}


class Watched:
    """A control plane (a ServingSystem) whose every step is checked. AssertionError with a Named message where one is broken."""

    def __init__(self, plane: ControlPlane, cluster: FaultyCluster, scenario: Scenario) -> None:
        system = scenario.system
        self.plane = plane
        self.recorder = Recorder()
        self._cluster = cluster
        autoscaler = system.autoscaler
        assert isinstance(autoscaler, Autoscaler), "every explored system has it"
        self._minimum = autoscaler.min_replicas
        self._checker = InvariantChecker(
            scenario.cluster, system.blocks, desired=autoscaler.desired, max_batch=system.batching.max_batch
        )
        self._answers = {each.request_id: each.answer_tokens for each in scenario.requests}
        self._begun: set[int] = set()
        self._gpus: dict[tuple[NodeId, str], tuple[int, float]] = {}  # GPUs held, and since when
        self._gpu_seconds = 0.0
        self._copies: dict[NodeId, set[str]] = {}
        self._sizes = {model.name: model.size_bytes for model in scenario.models}
        hardware = [scenario.cluster.node(node) for node in range(scenario.cluster.nodes)]
        self._totals = [node.gpus for node in hardware]
        self._budgets = [system.memory.room_bytes(node.host_memory_bytes) for node in hardware]
        self._failures: Counter[int] = Counter()  # failed instances that a request was on
        self._since: dict[int, float] = {}
        self._deadline_s = DEADLINE_S + 2 * sum(lasts_s(fault) for fault in scenario.faults)
        self._bound_s = MOST_S + 2 * self._deadline_s
        self.events = 0
        self._at = 0.0

    # -- a step ------------------------------------------------------------------------------------------------------

    def on_event(self, event: Event) -> Sequence[Command]:
        """See ServingSystem; checks the event, the commands and the state behind them."""
        self._see(event)
        commands = self.plane.on_event(event)
        for command in commands:
            self._told(event.at, command)
        self._settled()
        return commands

    def _see(self, event: Event) -> None:
        self.events += 1
        self._at = event.at
        if self.events > MOST_EVENTS or event.at > self._bound_s:
            raise AssertionError(Named("ends", f"{self.events} events, {event.at:.0f} s, and the run goes on"))
        if not (self._cluster.repeating and isinstance(event, BlockArrived)):
            self._checker.on_event(event)
        self.recorder.on_event(event)
        if isinstance(event, TokensProduced):
            if event.request_id in self._begun:
                raise AssertionError(Named("tokens", f"the first token of request {event.request_id} comes twice"))
            self._begun.add(event.request_id)
        elif isinstance(event, RequestFinished):
            self._check_answer(event)
        elif isinstance(event, CommandFailed) and event.instance in self.plane.fleet.instances:
            self._failures.update(list(self.plane.fleet.instances[event.instance].outstanding))
        elif isinstance(event, NodeLost | NodeJoined):
            self._copies.pop(event.node, None)
            for node, model in [key for key in self._gpus if key[0] == event.node]:
                self._take_back(node, model)

    def _check_answer(self, event: RequestFinished) -> None:
        request, wanted = event.request_id, self._answers[event.request_id]
        if event.tokens != wanted or request not in self._begun:
            raise AssertionError(Named("tokens", f"request {request} has {event.tokens} of its {wanted} tokens at its end"))

    def _told(self, at: float, command: Command) -> None:
        try:
            self._checker.on_command(at, command)
        except (ValueError, KeyError) as error:
            name = "plans" if isinstance(error, ValueError) else "accounts"
            raise AssertionError(Named(name, f"{type(command).__name__}: {error!r}")) from error
        self.recorder.on_command(at, command)
        if isinstance(command, AllocateNode):
            self._gpus[command.node, command.model] = (command.gpus, at)
        elif isinstance(command, ReleaseNode):
            self._take_back(command.node, command.model)
            if command.keep_host:
                self._copies.setdefault(command.node, set()).add(command.model)
                self._check_copies(command.node)
        elif isinstance(command, PlaceCopy):
            self._copies.setdefault(command.node, set()).add(command.model)
            self._check_copies(command.node)
        elif isinstance(command, EvictBlocks):
            self._copies.get(command.node, set()).discard(command.model)
        elif isinstance(command, Serve | Repartition):
            self._check_held(command)
        elif isinstance(command, LoadBlocks) and command.tier == "host":
            self._check_copy(command.node, command.model)
        elif isinstance(command, StartMulticast):
            for node, tier in zip(command.plan.sources, command.source_tiers, strict=True):
                if tier == "host":
                    self._check_copy(node, command.model)

    def _take_back(self, node: NodeId, model: str) -> None:
        gpus, since = self._gpus.pop((node, model))
        self._gpu_seconds += gpus * (self._at - since)

    def _check_copies(self, node: NodeId) -> None:
        used = sum(self._sizes[name] for name in self._copies[node])
        if used > self._budgets[node]:
            raise AssertionError(Named("host bytes", f"copies on node {node} take {used} of {self._budgets[node]} bytes"))

    def _check_copy(self, node: NodeId, model: str) -> None:
        if model not in self._copies.get(node, ()):
            raise AssertionError(Named("copies", f"node {node} is to read a host copy of {model}, which it does not have"))

    def _check_held(self, command: Serve | Repartition) -> None:
        """Compare with what nodes really hold. One that died unnoticed holds nothing, and nobody can know."""
        model = self.plane.fleet.instances[command.instance].model if isinstance(command, Repartition) else command.model
        for stage in command.stages:
            lacking = set(range(stage.first_block, stage.last_block + 1)) - self._cluster.held(stage.node, model)
            if lacking:
                raise AssertionError(Named("held", f"node {stage.node} serves {model} without its blocks {sorted(lacking)}"))

    # -- the state after a step --------------------------------------------------------------------------------------

    def _settled(self) -> None:
        fleet = self.plane.fleet
        held_by: dict[str, set[NodeId]] = {name: set() for name in fleet.models}
        left = self._totals.copy()
        for (node, model), (gpus, _) in self._gpus.items():
            left[node] -= gpus
            held_by[model].add(node)
        for node, free in fleet.gpus_free.items():
            if free != left[node] or free < 0:
                raise AssertionError(Named("accounts", f"node {node} has {free} GPUs free, not {left[node]}"))
        for name, state in fleet.models.items():
            self._check_places(state)
            held = held_by[name]
            if held != state.allocations.keys():
                raise AssertionError(Named("accounts", f"{name} has GPUs of {held}, not {set(state.allocations)}"))
        self._check_deadline()
        self._check_retries()

    def _check_retries(self) -> None:
        for request, failures in self._failures.items():
            if failures >= _TRIES and any(request in self._checker.open_requests(name) for name in self._sizes):
                raise AssertionError(Named("retry bound", f"request {request} was on {failures} failed instances, and goes on"))

    def _check_places(self, state: ModelState) -> None:
        name, queued = state.spec.name, len(state.queue)
        places = {request.request_id for request in state.queue}
        running = 0
        for instance in state.instances.values():
            running += len(instance.outstanding)
            places.update(instance.outstanding)
        if running != state.running:
            raise AssertionError(Named("one place", f"{name} counts {state.running} running requests of {running}"))
        if len(places) != queued + running:
            raise AssertionError(Named("one place", f"{queued + running - len(places)} requests of {name} are in two places"))
        missing = self._checker.open_requests(name) - places
        if missing:
            raise AssertionError(Named("one place", f"requests {sorted(missing)} of {name} are nowhere"))

    def _check_deadline(self) -> None:
        transfers = self.plane.fleet.transfers
        if transfers.keys() != self._since.keys():
            self._since = {number: self._since.get(number, self._at) for number in transfers}
        for number, since in self._since.items():
            if self._at - since > self._deadline_s:
                left = {node: sorted(blocks) for node, blocks in transfers[number].waiting.items()}
                raise AssertionError(Named("deadline", f"transfer {number} began at {since:.2f} and still lacks {left}"))

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Check what holds at the end: nothing is lost, nothing under way, the minimum of replicas, GPU-seconds."""
        self._checker.finish()
        fleet = self.plane.fleet
        if fleet.transfers:
            raise AssertionError(Named("idle minimum", f"transfers {sorted(fleet.transfers)} are still under way"))
        busy = {(node, port): left for node, port, left in fleet.traffic.busy()}
        if busy:
            raise AssertionError(Named("idle minimum", f"ports have still bytes to move: {busy}"))
        for state in fleet.models.values():
            self._check_minimum(state)
        for node, model in list(self._gpus):
            self._take_back(node, model)
        told = gpu_seconds(gpu_usage(self.recorder), self._at)
        if not isclose(told, self._gpu_seconds, rel_tol=1e-9, abs_tol=1e-6):
            raise AssertionError(Named("GPU-seconds", f"tables say {told}, allocations {self._gpu_seconds}"))

    def _check_minimum(self, state: ModelState) -> None:
        replicas, minimum, name = state.replicas, self._minimum, state.spec.name
        if replicas > minimum or (replicas < minimum and self.plane.fleet.free_nodes(state)):
            raise AssertionError(Named("idle minimum", f"{name} keeps {replicas} replicas, the minimum is {minimum}"))
        incomplete = [node for node, allocation in state.allocations.items() if not allocation.instances]
        if incomplete:
            raise AssertionError(Named("idle minimum", f"{name} has GPUs of nodes {incomplete}, which serve nothing"))
