"""Answers under way: prompts, the tokens produced so far, and the instances that may add to them.

The control plane moves requests between instances without their contents. This table keeps the contents, so that a request that
is restarted goes on where it was and no token reaches a client twice. All of it belongs to the control thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import structs

from lambdascale.core import Failure, NodeId
from lambdascale.core.commands import Dispatch, FailRequest, Repartition, Serve, StopInstance, SwitchMode
from lambdascale.core.events import CommandFailed, Event, Mode, RequestFinished, RequestPreempted, TokensProduced
from lambdascale.core.plan import Stage
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire


class Sink(Protocol):
    """Receiver of an answer. Called from the control thread; must return at once."""

    def tokens(self, tokens: Sequence[int], finished: bool) -> None:
        """Take the next tokens of the answer; ``finished`` with the last."""
        ...

    def failed(self, failure: Failure) -> None:
        """Record that the answer ends here with an error."""
        ...


class TokenTimes:
    """A sink that keeps the times of an answer's tokens (seconds of the run), by a clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.at_s: list[float] = []
        self.finished = False

    def tokens(self, tokens: Sequence[int], finished: bool) -> None:
        """See Sink."""
        self.at_s += [self._now()] * len(tokens)
        self.finished = finished

    def failed(self, failure: Failure) -> None:
        """See Sink."""


@dataclass
class _Answer:
    """A request in the cluster: its contents, and the instances whose tokens count.

    ``moves``: dissolved pipelines that have not handed it over yet, and to which instance each is to, in the order of the
    switches: a request may be moved on before its first handover is through.
    """

    ticket: Ticket
    sink: Sink | None
    owners: set[int] = field(default_factory=set)
    moves: dict[int, int] = field(default_factory=dict)
    aborted: bool = False


@dataclass
class _Served:
    """An instance in service, started by ``first``. ``nodes``: all that have had stages, the head (owner of its batches) first.

    ``version`` counts its partitions; ``batches`` is the largest number of batches it has had in flight. ``broken``: it has
    failed, or lost messages of its own; the control plane may not have heard of that.
    """

    first: Serve
    stages: tuple[Stage, ...]
    nodes: tuple[NodeId, ...]
    batches: int
    version: int = 0
    broken: bool = False

    @property
    def head(self) -> NodeId:
        """Node of the first stage when the instance was started."""
        return self.nodes[0]


@dataclass
class _Switch:
    """A mode switch under way: the dissolved pipeline's head, and the requests that have not resumed yet."""

    head: NodeId
    waiting: set[int]


class Answers:
    """``tell`` sends a message to a node (to nobody if it is lost), ``alive`` returns the members, ``emit`` queues an event."""

    def __init__(
        self,
        tell: Callable[[NodeId, wire.ToAgent], None],
        alive: Callable[[], Collection[NodeId]],
        emit: Callable[[Event], None],
    ) -> None:
        self._tell = tell
        self._alive = alive
        self._emit = emit
        self._answers: dict[int, _Answer] = {}
        # Requests whose end is among the queued events, and the instance that the control plane believes to have them.
        self._ended: dict[int, int] = {}
        self._instances: dict[int, _Served] = {}
        self._switches: dict[int, _Switch] = {}

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def outstanding(self) -> bool:
        """True if an instance works on a request, or a mode switch carries one."""
        return any(answer.owners or answer.moves for answer in self._answers.values())

    @property
    def sinks(self) -> list[Sink]:
        """Receivers that still wait for the end of their answer."""
        return [answer.sink for answer in list(self._answers.values()) if answer.sink is not None]

    # -- requests ----------------------------------------------------------------------------------------------------

    def begin(self, request_id: int, ticket: Ticket, sink: Sink | None, *, aborted: bool = False) -> None:
        """Take a request that has arrived; ``aborted``: its client has left already."""
        self._answers[request_id] = _Answer(ticket, None if aborted else sink, aborted=aborted)

    def abort(self, request_id: int) -> None:
        """End a request whose client has left. Nothing happens if it is unknown or complete."""
        answer = self._answers.get(request_id)
        if answer is None:
            return
        answer.aborted = True
        answer.sink = None
        for instance in answer.owners:
            if instance in self._instances:
                self._tell(self._instances[instance].head, wire.Abort(request_id))

    def end_aborted(self, message: wire.Aborted) -> None:
        """End a request whose client has left, now that its instance has."""
        answer = self._answers.get(message.request_id)
        if answer is not None and answer.aborted:
            self.finish(message.request_id, message.instance)

    def tokens(self, message: wire.Tokens) -> None:
        """Take the tokens of an instance's iteration, and the ids of requests that it preempted."""
        for request_id in message.preempted:
            answer = self._answers.get(request_id)
            if answer is not None and message.instance in answer.owners:
                self._emit(RequestPreempted(0.0, message.instance, request_id))
        by_request: dict[int, list[wire.Token]] = {}
        for token in message.tokens:
            by_request.setdefault(token.request_id, []).append(token)
        for request_id, tokens in by_request.items():
            self._take_tokens(message.instance, message.mode, request_id, tokens)

    def _take_tokens(self, instance: int, mode: Mode, request_id: int, tokens: Iterable[wire.Token]) -> None:
        """Add tokens of an instance that owns the request, in order and once."""
        answer = self._answers.get(request_id)
        if answer is None or instance not in answer.owners:
            return
        for token in tokens:
            if token.index != answer.ticket.produced:
                continue
            answer.ticket.tokens.append(token.token)
            if token.index == 0:
                self._emit(TokensProduced(0.0, instance, request_id, 1, mode))
            if answer.sink is not None:
                answer.sink.tokens([token.token], token.finished)
            if token.finished:
                self.finish(request_id, instance)
                return

    def finish(self, request_id: int, instance: int) -> None:
        """End a request, answered or aborted, that ``instance`` had last."""
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            self._end_moves(request_id, answer)
            self._ended[request_id] = instance
            self._emit(RequestFinished(0.0, instance, request_id, answer.ticket.produced))

    def deliver(self, event: RequestFinished) -> RequestFinished | None:
        """Return a request's end as it is told to the control plane now; None if that has given the request up.

        It may have restarted the request meanwhile, because it heard of its instance's failure first: it ends where it is now.
        """
        instance = self._ended.pop(event.request_id, None)
        if instance is None:
            return None
        return event if instance == event.instance else structs.replace(event, instance=instance)

    def resumed(self, message: wire.Resumed) -> None:
        """Take note that requests of a dissolved pipeline are with their new instance, and of the tokens that they brought.

        The new instance goes on behind those tokens, and the pipeline's message about them may be late or lost. A request that
        waits for its KV is still on its way: a lost connection within the pipeline may keep the KV from coming.
        """
        for request_id, output in message.outputs.items():
            tokens = (wire.Token(request_id, index, token, False) for index, token in enumerate(output))
            self._take_tokens(message.instance, "pipeline", request_id, tokens)
            answer = self._answers.get(request_id)
            if answer is not None and message.instance in answer.moves.values() and request_id not in message.waiting:
                self._end_moves(request_id, answer, message.instance)

    def _end_moves(self, request_id: int, answer: _Answer, instance: int | None = None) -> None:
        """Forget that mode switches carry the request, up to the one that brings it to ``instance``; each with its last one."""
        for pipeline, target in list(answer.moves.items()):
            del answer.moves[pipeline]
            switch = self._switches[pipeline]
            switch.waiting.discard(request_id)
            if not switch.waiting:
                del self._switches[pipeline]
            if target == instance:
                return

    # -- commands ----------------------------------------------------------------------------------------------------

    def dispatch(self, command: Dispatch) -> None:
        """Send requests to an instance's head; aborted ones end here."""
        tickets = []
        for request in command.requests:
            answer = self._answers.get(request.request_id)
            if answer is None:
                assert request.request_id in self._ended, "the control plane has not heard of its end"
                self._ended[request.request_id] = command.instance
                continue
            self._end_moves(request.request_id, answer)
            answer.owners = {command.instance}
            if answer.aborted:
                self.finish(request.request_id, command.instance)
            else:
                tickets.append(answer.ticket)
        if tickets:
            self._tell(self._instances[command.instance].head, wire.Assign(command.instance, tuple(tickets)))

    def fail(self, command: FailRequest) -> None:
        """Give a request up and tell its client. An end of it that is still queued is dropped: it counts once, as failed."""
        self._ended.pop(command.request_id, None)
        answer = self._answers.pop(command.request_id, None)
        if answer is None:
            return
        self._end_moves(command.request_id, answer)
        if answer.sink is not None:
            answer.sink.failed(command.failure)

    def serve(self, command: Serve) -> None:
        """Start an instance on the nodes of its stages."""
        nodes = _nodes(command.stages)
        self._instances[command.instance] = _Served(command, command.stages, nodes, len(nodes))
        for node in nodes:
            self._tell(node, wire.Do(command))

    def repartition(self, command: Repartition) -> None:
        """Tell the nodes of an instance's old and new stages how it is divided from now on."""
        served = self._instances[command.instance]
        nodes = _nodes(command.stages)
        served.stages = command.stages
        served.version += 1
        served.batches = max(served.batches, len(nodes))
        served.nodes = tuple(dict.fromkeys((*served.nodes, *nodes)))
        message = wire.NewStages(command, served.version, served.first, served.batches)
        for node in served.nodes:
            self._tell(node, message)

    def switch_mode(self, command: SwitchMode) -> None:
        """Dissolve a pipeline: its head hands the requests over to the heads of their targets."""
        served = self._instances.pop(command.pipeline)
        homes = {target: self._instances[target].head for _, target in command.moves}
        waiting = set()
        for request_id, target in command.moves:
            answer = self._answers.get(request_id)
            if answer is not None:
                answer.owners.add(target)
                answer.moves[command.pipeline] = target
                waiting.add(request_id)
        if waiting:
            self._switches[command.pipeline] = _Switch(served.head, waiting)
        self._tell(served.head, wire.Switch(command, homes))
        if command.kv == "recompute":
            for node in served.nodes[1:]:
                self._tell(node, wire.Do(StopInstance(command.pipeline)))
        if served.broken or served.head not in self._alive():
            self._redo_switch(command.pipeline)

    def _redo_switch(self, pipeline: int) -> None:
        """Hand over from here what the head of a dissolved pipeline had: it is lost, or it may have lost that.

        StopInstance goes to every node: KV of the pipeline may be on its way to any of them.
        """
        switch = self._switches.pop(pipeline, None)
        for request_id in () if switch is None else sorted(switch.waiting):
            answer = self._answers[request_id]
            del answer.moves[pipeline]
            answer.owners.discard(pipeline)
            for target in sorted(answer.owners & self._instances.keys()):
                self._tell(self._instances[target].head, wire.Assign(target, (answer.ticket,)))
        for node in sorted(self._alive()):
            self._tell(node, wire.Do(StopInstance(pipeline)))

    def stop(self, command: StopInstance) -> None:
        """Take an instance out of service; its requests wait for another dispatch."""
        served = self._instances.pop(command.instance, None)
        if served is None:
            return
        for request_id, answer in self._answers.items():
            answer.owners.discard(command.instance)
            if not answer.owners:
                self._end_moves(request_id, answer)
        for node in served.nodes:
            self._tell(node, wire.Do(command))

    def instance_failed(self, instance: int) -> None:
        """Take note that an instance has failed, which the control plane hears of later, and may have dissolved meanwhile.

        The head of a pipeline that did not start has none of its requests to hand over.
        """
        if instance in self._instances:
            self._instances[instance].broken = True
        elif instance in self._switches:
            self._redo_switch(instance)

    def connection_lost(self, node: NodeId, peer: NodeId) -> None:
        """Redo the mode switches whose messages may be lost; report the instances that the two nodes shared, and share no more.

        The control plane looks after those whose present stages are on both.
        """
        for pipeline, switch in list(self._switches.items()):
            if switch.head in (node, peer):
                self._redo_switch(pipeline)
        pair = {node, peer}
        for number, served in self._instances.items():
            if not pair <= set(served.nodes):
                continue
            served.broken = True
            if not pair <= set(_nodes(served.stages)):
                reason = f"nodes {node} and {peer} lost their connection, and owed each other parts of instance {number}"
                self._emit(CommandFailed(0.0, "Repartition", reason, instance=number))

    def node_lost(self, node: NodeId) -> None:
        """Redo the mode switches whose head was on ``node``, and report the instances that it has had a part in before.

        The control plane knows the nodes of an instance's present stages only. The head owns the requests wherever the stages
        are, and a node that has given its stages away may still owe their KV: these instances fail, so that their requests are
        restarted.
        """
        for pipeline, switch in list(self._switches.items()):
            if switch.head == node:
                self._redo_switch(pipeline)
        for number, served in self._instances.items():
            if node not in served.nodes:
                continue
            served.broken = True
            if node not in _nodes(served.stages):
                reason = f"node {node} was lost, which had stages of instance {number} before"
                self._emit(CommandFailed(0.0, "Repartition", reason, instance=number))


def _nodes(stages: Sequence[Stage]) -> tuple[NodeId, ...]:
    """The distinct nodes of the stages, in order of first appearance."""
    return tuple(dict.fromkeys(stage.node for stage in stages))
