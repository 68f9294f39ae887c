"""The simulated cluster with faults: nodes that die and return, messages late and repeated, a controller that stops, failures.

Between the simulated nodes and the control plane stand messages, as in a live cluster. What the contract allows, and so what
happens here: messages of one node keep their order, also when they are late or come twice; those of different nodes come in any
order. A node's messages from before its loss may come until the loss is told, none afterwards. A lost node answers no command,
also while its loss is not known yet. Times of events never go back.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, cast

from msgspec import structs

from lambdascale.control.batching import BatchedRequest
from lambdascale.core import ModelSpec, NodeId
from lambdascale.core.commands import (
    AllocateNode,
    CancelTransfer,
    Command,
    Dispatch,
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
    NodeGivenUp,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    TimerFired,
    TokensProduced,
)
from lambdascale.core.timing import ComputeModel, IterationSize
from lambdascale.explore.faults import BadNode, Broken, ClockStep, Fault, Late, Loss, Pause, Poison, Repeat, Slow, victim
from lambdascale.explore.ledger import Ledger
from lambdascale.explore.scenario import Scenario
from lambdascale.sim import SimConfig
from lambdascale.sim.backend import SimBackend
from lambdascale.sim.instances import SimInstance

# Seconds by which a timer may be early: sums of floats.
_TOLERANCE = 1e-9
# Seconds after which an instance fails that a poisoned request or a bad node makes fail.
_FAILS_AFTER_S = 0.004
# Requests as they stand when an instance ends: (request, tokens produced).
_Works = list[BatchedRequest]


class _Message(Event, frozen=True, gc=False):
    """An event on its way from node ``source`` (-1: the controller's own) of a ``generation``."""

    event: Event
    source: NodeId
    generation: int


class _Paced(ComputeModel):
    """A node's compute model that a fault may slow down."""

    def __init__(self, node: Any, model: ModelSpec, pace: Callable[[], float]) -> None:
        super().__init__(node, model)
        self._pace = pace

    def iteration_s(self, iteration: IterationSize, share: float = 1.0) -> float:
        """See ComputeModel."""
        return self._pace() * super().iteration_s(iteration, share)

    def decode_run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """See ComputeModel."""
        return self._pace() * super().decode_run_s(batch, context_tokens, steps)

    def decode_steps_by(self, batch: int, context_tokens: int, elapsed_s: float) -> int:
        """See ComputeModel."""
        pace = self._pace()
        if pace == 1.0:
            return super().decode_steps_by(batch, context_tokens, elapsed_s)
        steps = 1
        while self.decode_run_s(batch, context_tokens, steps) < elapsed_s:
            steps += 1
        return steps


class FaultyCluster(SimBackend):
    """Carries out a scenario. ``struck``: called with the time and a fault's description when one happens."""

    def __init__(self, scenario: Scenario, struck: Callable[[float, str], None] = lambda at, what: None) -> None:
        # Set before the base class, whose table of handlers names overridden methods.
        self._ledger = Ledger()
        self._nodes = scenario.cluster.nodes
        self._struck = struck
        self._blocks = scenario.system.blocks
        self._prompt_tokens = {each.request_id: each.prompt_tokens for each in scenario.requests}
        super().__init__(
            config=SimConfig(),
            cluster=scenario.cluster,
            models=scenario.models,
            requests=scenario.requests,
            batching=scenario.system.batching,
            seed=scenario.seed,
        )
        self._handlers[FailRequest] = self._ledger.fail
        self._handlers[ReleaseNode] = self._release
        self._handlers[AllocateNode] = self._allocate
        self._faults: dict[tuple[str, int], list[Fault]] = {}
        for fault in scenario.faults:
            if fault.when.what:
                self._faults.setdefault((fault.when.what, fault.when.nth), []).append(fault)
        self._seen = Counter[str]()
        # What nodes really hold in GPU memory, whatever the control plane has heard: blocks by (node, model).
        self._holds: dict[tuple[NodeId, str], set[int]] = {}
        self._generation = dict.fromkeys(range(self._nodes), 0)
        self._members = set(range(self._nodes))  # nodes that the controller takes for alive
        self._heard: deque[tuple[Event, bool]] = deque()
        self.repeating = False  # the event just returned was told before
        self._delay_s = dict.fromkeys(range(self._nodes), 0.0)
        self._latest_s = dict.fromkeys(range(self._nodes), 0.0)
        self._pace = dict.fromkeys(range(self._nodes), 1.0)
        self._paused_until = 0.0
        self._held: list[_Message] = []
        self._repeats: deque[float] = deque()
        self._damaged: set[int] = set()
        self._poisoned: set[int] = set()
        self._bad: set[NodeId] = set()
        self._offset_s = 0.0
        self._at = 0.0
        self._timers: dict[int, float] = {}
        self._served: dict[int, Serve] = {}
        self._stages: dict[int, set[NodeId]] = {}
        self._ever: dict[int, tuple[NodeId, ...]] = {}  # all nodes an instance has had, its head first
        self._stranded: dict[int, _Works] = {}
        self._switching: dict[int, tuple[NodeId, dict[int, int]]] = {}  # switches whose head is lost: head, request -> target
        self._copying: dict[int, tuple[frozenset[NodeId], BatchedRequest, int]] = {}

    # -- Backend -----------------------------------------------------------------------------------------------------

    def submit(self, command: Command) -> None:
        """See Backend."""
        super().submit(command)
        self._note(command)

    def next_event(self) -> Event | None:
        """See Backend."""
        while True:
            while self._heard:
                event, self.repeating = self._heard.popleft()
                told = self._ledger.deliver(event) if isinstance(event, RequestFinished) else event
                if told is not None:
                    told = structs.replace(told, at=self._tick())
                    self._note(told)
                    return told
            found = super().next_event()
            if found is None:
                return None
            if isinstance(found, _Message):
                self._hear(found)
            else:
                self._send(found)

    def _tick(self) -> float:
        self._at = max(self._at, self.kernel.now + self._offset_s)
        return self._at

    # -- messages ----------------------------------------------------------------------------------------------------

    def _send(self, event: Event) -> None:
        """Send what happened to the controller: at once, or late; a damaged block becomes a failure."""
        source = self._source(event)
        if isinstance(event, BlockArrived):
            if event.block in self._holds.get((event.node, event.model), ()):
                return  # nodes report a block once, whatever brings it
            if event.transfer_id in self._damaged:
                self._damaged.discard(event.transfer_id)
                reason = f"block {event.block} is damaged"
                event = CommandFailed(event.at, "StartMulticast", reason, transfer_id=event.transfer_id)
            else:
                self._put(event)
        message = _Message(event.at, event, source, self._generation.get(source, 0))
        if source < 0:
            self._hear(message)
            return
        due = max(self.kernel.now + self._delay_s[source], self._latest_s[source])
        self._latest_s[source] = due
        self._post(message, due)
        if self._repeats:
            due = self._latest_s[source] = max(due, self.kernel.now + self._repeats.popleft())
            self._post(structs.replace(message, at=-1.0), due)

    def _put(self, event: BlockArrived) -> None:
        self._holds.setdefault((event.node, event.model), set()).add(event.block)

    def _post(self, message: _Message, due: float) -> None:
        if due <= self.kernel.now:
            self._hear(message)
        else:
            self.kernel.at(due, cast("Callable[[Any], None]", self._events.append), message)

    def _source(self, event: Event) -> NodeId:
        if isinstance(event, BlockArrived):
            return event.node
        if isinstance(event, TokensProduced | RequestFinished):
            return self._ever[event.instance][0]
        return -1

    def _hear(self, message: _Message) -> None:
        """Let the controller take a message, once it runs, unless its sender is not a member any more."""
        if self.kernel.now < self._paused_until:
            self._held.append(message)
            return
        event, source = message.event, message.source
        if source >= 0 and (source not in self._members or self._generation[source] != message.generation):
            return
        told: Event | None = event
        if isinstance(event, RequestArrived):
            self._ledger.begin(event.request.request_id)
        elif isinstance(event, TokensProduced):
            told = self._ledger.tokens(event)
        elif isinstance(event, RequestFinished):
            told = self._ledger.finish(event)
        if told is not None:
            self._heard.append((told, message.at < 0))
        if isinstance(event, NodeLost) or (isinstance(event, NodeJoined) and event.at and event.node in self._members):
            self._forget(event.node)
        if isinstance(event, NodeJoined):
            self._members.add(event.node)

    def _forget(self, node: NodeId) -> None:
        """Forget a member, and redo or report what depended on it, as a live controller does."""
        self._members.discard(node)
        for pipeline, (head, moves) in list(self._switching.items()):
            if head == node:
                del self._switching[pipeline]
                self._redo(moves)
        for number, nodes in self._ever.items():
            if number in self._served and node in nodes and node not in self._stages[number]:
                reason = f"node {node} was lost, which had stages of instance {number} before"
                self._heard.append((CommandFailed(0.0, "Repartition", reason, instance=number), False))

    def _redo(self, moves: dict[int, int]) -> None:
        for request_id, target in moves.items():
            if target in self._ledger.owners(request_id):
                self._assign(target, [request_id])

    # -- faults ------------------------------------------------------------------------------------------------------

    def _note(self, entry: Event | Command) -> None:
        """Count an event or a command; let the faults happen that are tied to it."""
        kinds = [type(entry).__name__, "Event"] if isinstance(entry, Event) else [type(entry).__name__]
        for kind in kinds:
            self._seen[kind] += 1
            for fault in self._faults.get((kind, self._seen[kind]), ()):
                self.kernel.at(self.kernel.now + fault.when.after_s, self._strike, (fault, _nodes_of(entry, self._ever), entry))

    def _strike(self, entry: tuple[Fault, tuple[NodeId, ...], Event | Command]) -> None:
        fault, near, cause = entry
        node = victim(fault, near, self._nodes)
        if isinstance(fault, Loss):
            self._lose(node, fault)
        elif isinstance(fault, Slow):
            self._slow((node, fault, fault.flaps))
        elif isinstance(fault, Late):
            self._say(f"messages of node {node} take {fault.delay_s:g} s for {fault.lasts_s:g} s")
            self._delay_s[node] = fault.delay_s
            self.kernel.at(self.kernel.now + fault.lasts_s, lambda _: self._delay_s.update({node: 0.0}))
        elif isinstance(fault, Pause):
            self._pause(fault)
        elif isinstance(fault, Repeat):
            self._say(f"the next {fault.count} messages come twice, {fault.after_s:g} s apart")
            self._repeats.extend([fault.after_s] * fault.count)
        elif isinstance(fault, ClockStep):
            self._say(f"the clock steps by {fault.step_s:g} s")
            self._offset_s += fault.step_s
            for timer in list(self._timers):
                self.kernel.at(self.kernel.now, self._timer_due, timer)
        elif isinstance(fault, Poison):
            self._poison(fault)
        elif isinstance(fault, BadNode):
            self._say(f"every instance fails on node {node} from now on")
            self._bad.add(node)
        elif isinstance(fault, Broken):
            self._break(fault, cause)

    def _say(self, what: str) -> None:
        self._struck(max(self._at, self.kernel.now + self._offset_s), what)

    def _pause(self, fault: Pause) -> None:
        self._say(f"the controller stops for {fault.lasts_s:g} s")
        self._paused_until = max(self._paused_until, self.kernel.now + fault.lasts_s)
        self.kernel.at(self._paused_until, self._go_on)

    def _go_on(self, _: object) -> None:
        if self.kernel.now < self._paused_until:
            return
        held, self._held = self._held, []
        for message in held:
            self._hear(message)
        if self._heard:  # next_event looks at what was heard once the kernel returns
            self._events.append(_Message(0.0, Event(0.0), self._nodes, 0))

    def _slow(self, entry: tuple[NodeId, Slow, int]) -> None:
        node, fault, left = entry
        self._say(f"node {node} is slow for {fault.lasts_s:g} s: compute {fault.compute:g} times, link at {fault.nic:g}")
        self._pace[node] = fault.compute
        self._transfers.set_nic_share(node, fault.nic)
        now = self.kernel.now
        self.kernel.at(now + fault.lasts_s, self._recover, node)
        if left > 1:
            self.kernel.at(now + 2 * fault.lasts_s, self._slow, (node, fault, left - 1))

    def _recover(self, node: NodeId) -> None:
        self._pace[node] = 1.0
        self._transfers.set_nic_share(node, 1.0)

    def _break(self, fault: Broken, cause: Event | Command) -> None:
        """Let the transfer or the instance of a command fail."""
        if isinstance(cause, StartMulticast | LoadBlocks):
            number = cause.transfer_id
            if fault.damage:
                self._say(f"the next block of transfer {number} is damaged")
                self._damaged.add(number)
            else:
                self._say(f"transfer {number} fails")
                self._hear(_Message(0.0, CommandFailed(0.0, type(cause).__name__, "broken", transfer_id=number), -1, 0))
        elif isinstance(cause, Serve | Dispatch | SwitchMode):
            self._fail_instance(
                cause.moves[0][1] if isinstance(cause, SwitchMode) and cause.moves else getattr(cause, "instance", -1)
            )
        self._wake()

    def _fail_instance(self, number: int) -> None:
        if number in self._instances:
            self._say(f"instance {number} fails")
            self._strand(number)
            self._hear(_Message(0.0, CommandFailed(0.0, "Serve", "broken", instance=number), -1, 0))
            self._wake()

    def _poison(self, fault: Poison) -> None:
        arrived = [number for number in self._prompt_tokens if number in self._ledger]
        if arrived:
            request = arrived[fault.pick % len(arrived)]
            self._say(f"instances that request {request} is sent to fail from now on")
            self._poisoned.add(request)

    def _wake(self) -> None:
        """Have ``next_event`` look at what was heard: the kernel returns once there is an event."""
        self._events.append(_Message(0.0, Event(0.0), self._nodes, 0))

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _lose(self, node: NodeId, fault: Loss) -> None:
        if node in self._lost or node not in self._members:
            return
        self._say(f"node {node} dies; noticed {_after(fault.noticed_s)}, then: {fault.then}, {fault.back_s:g} s later")
        self._lost.add(node)
        self._transfers.node_lost(node)
        self._holds = {key: blocks for key, blocks in self._holds.items() if key[0] != node}
        for number in list(self._instances):
            if node in self._ever[number]:
                self._strand(number)
        for request_id, (sources, work, target) in list(self._copying.items()):
            if node in sources:
                del self._copying[request_id]
                super()._resume(target, work, cached=False)
        if fault.noticed_s is None:
            self.kernel.at(self.kernel.now + fault.back_s, self._return, node)
        else:
            self.kernel.at(self.kernel.now + fault.noticed_s, self._notice, (node, fault))

    def _notice(self, entry: tuple[NodeId, Loss]) -> None:
        node, fault = entry
        self._hear(_Message(0.0, NodeLost(self.kernel.now, node, fault.then != "never"), -1, 0))
        self._wake()
        if fault.then == "back":
            self.kernel.at(max(self.kernel.now + fault.back_s, self._paused_until), self._return, node)
        elif fault.then == "given up":
            self.kernel.at(self.kernel.now + fault.back_s, self._give_up, node)

    def _give_up(self, node: NodeId) -> None:
        self._say(f"node {node} is given up")
        self._hear(_Message(0.0, NodeGivenUp(0.0, node), -1, 0))
        self._wake()

    def _return(self, node: NodeId) -> None:
        """Let a node join anew, empty; it is a new generation, of which no old command and message knows."""
        if self.kernel.now < self._paused_until:  # nodes join with the controller's help
            self.kernel.at(self._paused_until, self._return, node)
            return
        self._say(f"node {node} is back")
        self._generation[node] += 1
        self._lost.discard(node)
        self._bad.discard(node)
        self._transfers.node_restored(node)
        self._delay_s[node] = 0.0
        self._hear(_Message(0.0, NodeJoined(self.kernel.now, node), -1, 0))
        self._wake()

    # -- instances ---------------------------------------------------------------------------------------------------

    def _end_instance(self, number: int) -> _Works:
        """Drain an instance; what it has produced counts, as far as its client can have it."""
        instance = self._instances.pop(number, None)
        works = [] if instance is None else instance.drain()
        for work in works:
            self._ledger.progress(work.request_id, work.produced)
        return works

    def _strand(self, number: int) -> None:
        """Stop an instance one of whose nodes died; its head, if it lives, still has the requests."""
        self._stranded[number] = self._end_instance(number)

    def _serve(self, command: Serve) -> None:
        nodes = tuple(dict.fromkeys(stage.node for stage in command.stages))
        self._served[command.instance] = command
        self._stages[command.instance] = set(nodes)
        self._ever[command.instance] = nodes
        super()._serve(command)
        if command.instance not in self._instances:
            self._stranded[command.instance] = []
        if not self._bad.isdisjoint(nodes):
            self.kernel.at(self.kernel.now + _FAILS_AFTER_S, self._fail_instance, command.instance)

    def _repartition(self, command: Repartition) -> None:
        nodes = tuple(dict.fromkeys(stage.node for stage in command.stages))
        self._stages[command.instance] = set(nodes)
        self._ever[command.instance] = tuple(dict.fromkeys((*self._ever[command.instance], *nodes)))
        super()._repartition(command)

    def _dispatch(self, command: Dispatch) -> None:
        self._assign(command.instance, self._ledger.dispatch(command))

    def _assign(self, number: int, requests: Iterable[int]) -> None:
        """Let an instance work on requests from the tokens on that are known to exist."""
        works = []
        for request_id in requests:
            answer = self._answer_tokens[request_id]
            produced = min(self._ledger.produced(request_id), answer - 1)
            works.append(BatchedRequest(request_id, self._prompt_tokens[request_id], answer, produced))
        if any(work.request_id in self._poisoned for work in works):
            self.kernel.at(self.kernel.now + _FAILS_AFTER_S, self._fail_instance, number)
        if number in self._instances:
            self._instances[number].take(works)
        elif number in self._stranded:
            self._stranded[number] += works

    def _stop_instance(self, command: StopInstance) -> None:
        self._end_instance(command.instance)
        self._ledger.stop(command)
        self._stranded.pop(command.instance, None)
        self._served.pop(command.instance, None)

    def _switch_mode(self, command: SwitchMode) -> None:
        self._ledger.switch(command)
        self._served.pop(command.pipeline, None)
        pipeline = self._instances.pop(command.pipeline, None)
        moves = dict(command.moves)
        if pipeline is not None:
            works = pipeline.drain()
            for work in works:
                self._ledger.progress(work.request_id, work.produced)
            self._hand_over(pipeline, works, moves, command)
            return
        head = self._ever[command.pipeline][0]
        if head in self._lost or head not in self._members:
            self._switching[command.pipeline] = (head, moves)
            if head not in self._members:
                del self._switching[command.pipeline]
                self._redo(moves)
            return
        for work in self._stranded.pop(command.pipeline, ()):
            if work.request_id in moves:
                super()._resume(moves[work.request_id], work, cached=False)

    def _hand_over(self, pipeline: SimInstance, works: _Works, moves: dict[int, int], command: SwitchMode) -> None:
        for work in works:
            target = moves.get(work.request_id)
            if target is None:
                continue  # the control plane believes it to be elsewhere
            if command.kv == "copy" and work.produced:
                self._copying[work.request_id] = (frozenset(pipeline.nodes), work, target)
                self._copy_kv(pipeline, work, target)
            else:
                self._resume(target, work, cached=False)

    def _resume(self, target: int, work: BatchedRequest, *, cached: bool) -> None:
        if cached and self._copying.pop(work.request_id, None) is None:
            return
        self._copying.pop(work.request_id, None)
        super()._resume(target, work, cached=cached)

    # -- what nodes hold ---------------------------------------------------------------------------------------------

    def held(self, node: NodeId, model: str) -> set[int]:
        """Return the blocks that a node really holds; all of them if it is dead, which nobody may know yet."""
        return self._holds.get((node, model), set()) if node not in self._lost else set(range(self._blocks))

    def _allocate(self, command: AllocateNode) -> None:
        if command.node not in self._lost:
            self._holds[command.node, command.model] = set()

    def _release(self, command: ReleaseNode) -> None:
        self._holds.pop((command.node, command.model), None)

    def _cancel(self, command: CancelTransfer) -> None:
        self._damaged.discard(command.transfer_id)
        super()._cancel(command)

    # -- time --------------------------------------------------------------------------------------------------------

    def _timing(self, model: ModelSpec, node: NodeId) -> ComputeModel:
        return _Paced(self._cluster.node(node), model, lambda: self._pace[node])

    def _set_timer(self, command: SetTimer) -> None:
        self._timers[command.timer_id] = command.at
        self._timer_due(command.timer_id)

    def _timer_due(self, timer_id: int) -> None:
        due = self._timers.get(timer_id)
        if due is None:
            return
        left = due - max(self._at, self.kernel.now + self._offset_s)
        if left <= _TOLERANCE:
            del self._timers[timer_id]
            self._events.append(TimerFired(self.kernel.now, timer_id))
        else:
            self.kernel.at(self.kernel.now + due - (self.kernel.now + self._offset_s), self._timer_due, timer_id)


def _after(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:g} s later"


def _nodes_of(entry: Event | Command, ever: dict[int, tuple[NodeId, ...]]) -> tuple[NodeId, ...]:
    """Nodes that an event or command concerns."""
    if isinstance(entry, StartMulticast):
        return entry.plan.members
    if isinstance(entry, BlockArrived | NodeLost | NodeJoined | AllocateNode | ReleaseNode | LoadBlocks | PlaceCopy):
        return (entry.node,)
    if isinstance(entry, Serve | Dispatch | StopInstance | Repartition | TokensProduced | RequestFinished):
        return ever.get(entry.instance, ())
    if isinstance(entry, SwitchMode):
        return ever.get(entry.pipeline, ())
    return ()
