"""A node's computing: one thread that runs the iterations of its instances, a replica's as well as its stages of pipelines.

The node of a pipeline's first stage is its head: it has the batches, starts their iterations and takes note of the tokens that
come back from the last stage. A replica is a pipeline of one stage and one batch. All state belongs to the thread; others
``post`` what is to be done between iterations.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

from lambdascale.control.batching import BatchLimits
from lambdascale.core import NodeId
from lambdascale.core.commands import Serve
from lambdascale.core.events import CommandFailed, Mode
from lambdascale.core.plan import Stage
from lambdascale.inference.batch import Batch, BatchPlan, Ticket
from lambdascale.live import wire
from lambdascale.live.node.runners import Executor, Runner

SendPeer = Callable[[NodeId, wire.Peer], None]


@dataclass
class _Instance:
    """What this node has of an instance: runners by stage and, at the head, its batches and their iterations under way."""

    instance: int
    model: str
    mode: Mode
    stages: tuple[Stage, ...]
    runners: dict[int, Runner]
    batches: list[Batch] = field(default_factory=list)
    running: dict[int, BatchPlan] = field(default_factory=dict)

    def batch_of(self, request_id: int) -> Batch | None:
        """The batch that has a request."""
        return next((batch for batch in self.batches if request_id in batch), None)


@dataclass
class _Expected:
    """A request whose KV is on its way in parts."""

    ticket: Ticket
    parts: dict[int, wire.KvPart] = field(default_factory=dict)


class Compute:
    """``report`` sends messages to the controller, ``send`` to other agents (silently to nobody where the node is dead)."""

    def __init__(
        self,
        node: NodeId,
        executor: Executor,
        limits: BatchLimits,
        slot_tokens: int,
        vocab: Callable[[str], int],
        report: Callable[[wire.ToController], None],
        send: SendPeer,
    ) -> None:
        self._node = node
        self._executor = executor
        self._limits = limits
        self._slot_tokens = slot_tokens
        self._vocab = vocab
        self._report = report
        self._send = send
        self._instances: dict[int, _Instance] = {}
        self._ended: set[int] = set()
        self._early: dict[int, list[Callable[[], None]]] = {}
        self._forwards: deque[wire.Forward] = deque()
        self._expected: dict[tuple[int, int], _Expected] = {}
        self._kv: dict[tuple[int, int], list[bytes]] = {}
        self._occupied = 0
        self._posted: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the iteration under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        for instance in list(self._instances):
            self._drop(instance)

    def post(self, job: Callable[[], None]) -> Future[None]:
        """Do something between iterations; the future is done when it has been."""
        done = Future[None]()
        with self._wake:
            self._posted.append((job, done))
            self._wake.notify()
        return done

    # -- what the node is told (from any thread) ---------------------------------------------------------------------

    def serve(self, command: Serve) -> None:
        """Serve this node's stages of an instance."""
        mode: Mode = "local" if len(command.stages) == 1 else "pipeline"
        self.post(lambda: self._start(command.instance, command.model, mode, command.stages))

    def assign(self, message: wire.Assign) -> None:
        """Requests for an instance whose head is here."""
        self.post(lambda: self._when_there(message.instance, lambda: self._assign(message)))

    def stop(self, instance: int) -> Future[None]:
        """Forget an instance and all its requests."""
        return self.post(lambda: self._drop(instance))

    def abort(self, request_id: int) -> None:
        """End a request."""
        self.post(lambda: self._abort(request_id))

    def switch(self, message: wire.Switch) -> None:
        """Dissolve a pipeline whose head is here."""
        self.post(lambda: self._switch(message))

    def occupy(self, busy: bool) -> Future[None]:
        """Something else takes the device: no new iteration starts until all have given it back."""
        return self.post(lambda: self._occupy(busy))

    def peer(self, message: wire.Peer) -> None:
        """A message of another node's agent."""
        handlers: dict[type, Callable[[Any], None]] = {
            wire.Forward: self._take_forward,
            wire.Chosen: self._chosen,
            wire.Handover: self._handover,
            wire.Collect: self._collect,
            wire.KvPart: self._kv_part,
        }
        self.post(partial(handlers[type(message)], message))

    def lost(self, peer: NodeId) -> None:
        """A peer is gone: KV that may not come is computed anew."""
        self.post(self._stop_waiting)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._posted and not self._stopping and not self._has_work():
                    self._wake.wait()
                if self._stopping and not self._posted:  # somebody may wait for what was posted
                    return
                posted, self._posted = self._posted, deque()
            for job, done in posted:
                self._guarded(job, -1)
                done.set_result(None)
            if not self._occupied:
                self._iterate()

    def _guarded(self, job: Callable[[], None], instance: int) -> None:
        try:
            job()
        except Exception as error:
            traceback.print_exc()
            reason = f"node {self._node}: {type(error).__name__}: {error}"
            self._report(wire.Happened(CommandFailed(0.0, "Compute", reason, instance=instance)))

    def _has_work(self) -> bool:
        if self._occupied:
            return False
        return bool(self._forwards) or any(self._idle_batches(i) for i in self._instances.values())

    @staticmethod
    def _idle_batches(instance: _Instance) -> list[int]:
        return [index for index, batch in enumerate(instance.batches) if len(batch) and index not in instance.running]

    def _iterate(self) -> None:
        """One stage's iteration: what pipelines wait for first, then each instance's next in turn."""
        if self._forwards:
            forward = self._forwards.popleft()
            self._guarded(lambda: self._run_stage(forward), forward.instance)
            return
        for number, instance in list(self._instances.items()):
            idle = self._idle_batches(instance)
            if idle:
                # To the end of the queue, so that instances take turns.
                self._instances[number] = self._instances.pop(number)
                self._guarded(partial(self._begin, instance, idle[0]), number)
                return

    # -- iterations --------------------------------------------------------------------------------------------------

    def _begin(self, instance: _Instance, index: int) -> None:
        """Start an iteration of a batch at the head."""
        plan = instance.batches[index].next()
        if plan is None:
            return
        for request_id, slot in plan.settling:
            instance.runners[0].write_kv(slot, self._kv.pop((instance.instance, request_id)))
        iteration = plan.iteration
        work = wire.Pass(
            plan.batch,
            iteration.prefill_tokens,
            iteration.context_tokens,
            iteration.attended_tokens,
            tuple(plan.rules),
            tuple(plan.positions),
        )
        instance.running[index] = plan
        self._compute(instance, index, 0, work, plan.tokens)

    def _run_stage(self, forward: wire.Forward) -> None:
        instance = self._instances.get(forward.instance)
        if instance is not None:
            self._compute(instance, forward.batch, forward.stage, forward.work, forward.hidden)

    def _compute(self, instance: _Instance, batch: int, stage: int, work: wire.Pass, inputs: Sequence[int] | bytes) -> None:
        output = instance.runners[stage].run(work, inputs)
        if isinstance(output, bytes):
            following = stage + 1
            message: wire.Peer = wire.Forward(instance.instance, batch, following, work, output)
            self._tell(instance.stages[following].node, message)
        else:
            self._tell(instance.stages[0].node, wire.Chosen(instance.instance, batch, tuple(output)))

    def _tell(self, node: NodeId, message: wire.Peer) -> None:
        if node != self._node:
            self._send(node, message)
        elif isinstance(message, wire.Forward):
            self._forwards.append(message)
        elif isinstance(message, wire.Chosen):
            self._chosen(message)
        else:
            self.peer(message)

    def _take_forward(self, forward: wire.Forward) -> None:
        self._when_there(forward.instance, lambda: self._forwards.append(forward))

    def _chosen(self, message: wire.Chosen) -> None:
        instance = self._instances.get(message.instance)
        if instance is None:
            return
        plan = instance.running.pop(message.batch)
        produced = instance.batches[message.batch].complete(plan, message.tokens)
        if produced:
            tokens = tuple(wire.Token(p.request_id, p.index, p.token, p.finished) for p in produced)
            self._report(wire.Tokens(instance.instance, instance.mode, tokens))

    # -- instances ---------------------------------------------------------------------------------------------------

    def _start(self, number: int, model: str, mode: Mode, stages: tuple[Stage, ...]) -> None:
        """Make runners for this node's stages. A pipeline keeps a batch in flight per node (reference, section 2.4)."""
        nodes = len({stage.node for stage in stages})
        per_batch = self._limits.max_batch
        runners = {
            index: self._executor.runner(model, stage.first_block, stage.last_block, nodes * per_batch)
            for index, stage in enumerate(stages)
            if stage.node == self._node
        }
        instance = _Instance(number, model, mode, stages, runners)
        if stages[0].node == self._node:
            slots = [range(i * per_batch, (i + 1) * per_batch) for i in range(nodes)]
            instance.batches = [Batch(self._limits, part, self._slot_tokens, self._vocab(model)) for part in slots]
        self._instances[number] = instance
        for job in self._early.pop(number, ()):
            job()

    def _when_there(self, instance: int, job: Callable[[], None]) -> None:
        """Now, or when the instance has been started: messages of different senders overtake each other."""
        if instance in self._instances:
            job()
        elif instance not in self._ended:
            self._early.setdefault(instance, []).append(job)

    def _assign(self, message: wire.Assign) -> None:
        instance = self._instances[message.instance]
        for ticket in message.tickets:
            self._add(instance, ticket)

    def _add(self, instance: _Instance, ticket: Ticket, *, cached: bool = False) -> None:
        if instance.batch_of(ticket.request_id) is None:  # it may come twice when a node dies during a mode switch
            min(instance.batches, key=len).add(ticket, cached=cached)

    def _drop(self, number: int) -> None:
        self._ended.add(number)
        self._early.pop(number, None)
        instance = self._instances.pop(number, None)
        if instance is None:
            return
        for runner in instance.runners.values():
            runner.close()
        self._forwards = deque(f for f in self._forwards if f.instance != number)
        for table in (self._expected, self._kv):
            for key in [key for key in table if key[0] == number]:
                del table[key]

    def _abort(self, request_id: int) -> None:
        for instance in self._instances.values():
            batch = instance.batch_of(request_id)
            if batch is None:
                continue
            index = instance.batches.index(batch)
            if index in instance.running:
                # It is in the iteration under way: it ends with its next token instead.
                ticket = batch.ticket(request_id)
                ticket.stop_tokens = frozenset(range(self._vocab(instance.model)))
                return
            batch.take(request_id)
            self._kv.pop((instance.instance, request_id), None)
            self._report(wire.Aborted(instance.instance, request_id))
            return

    def _occupy(self, busy: bool) -> None:
        self._occupied += 1 if busy else -1

    # -- mode switch -------------------------------------------------------------------------------------------------

    def _switch(self, message: wire.Switch) -> None:
        """Hand the requests over. The tokens in flight are redone; KV goes along where the policy says so and it is complete."""
        command = message.command
        pipeline = self._instances.get(command.pipeline)
        if pipeline is None:
            return
        moves = [(request_id, target) for request_id, target in command.moves if pipeline.batch_of(request_id) is not None]
        kv_moves = list(self._kv_moves(pipeline, moves, message.homes)) if command.kv == "copy" else []
        with_kv = frozenset(move.request_id for move in kv_moves)
        for target, group in groupby(sorted(moves, key=lambda move: move[1]), key=lambda move: move[1]):
            tickets = tuple(self._take(pipeline, request_id) for request_id, _ in group)
            kept = frozenset(t.request_id for t in tickets) & with_kv
            self._tell(message.homes[target], wire.Handover(target, tickets, kept))
        if command.kv == "copy":
            for node in dict.fromkeys(stage.node for stage in pipeline.stages[1:]):
                if node != self._node:
                    self._send(node, wire.Collect(command.pipeline, tuple(kv_moves)))
            self._collect(wire.Collect(command.pipeline, tuple(kv_moves)))
        else:
            self._drop(command.pipeline)

    @staticmethod
    def _kv_moves(pipeline: _Instance, moves: Iterable[tuple[int, int]], homes: dict[int, NodeId]) -> Iterable[wire.KvMove]:
        for request_id, target in moves:
            batch = pipeline.batch_of(request_id)
            slot = None if batch is None else batch.cached_slot(request_id)
            if batch is not None and slot is not None:
                tokens = len(batch.ticket(request_id).tokens) - 1
                yield wire.KvMove(request_id, slot, tokens, target, homes[target])

    @staticmethod
    def _take(pipeline: _Instance, request_id: int) -> Ticket:
        batch = pipeline.batch_of(request_id)
        assert batch is not None, "only what is here is handed over"
        return batch.ticket(request_id)

    def _collect(self, message: wire.Collect) -> None:
        """Send this node's KV of a dissolved pipeline off and forget the pipeline."""
        pipeline = self._instances.get(message.pipeline)
        if pipeline is None:
            return
        for move in message.moves:
            for runner in pipeline.runners.values():
                data = runner.read_kv(move.slot, move.tokens)
                part = wire.KvPart(move.instance, move.request_id, runner.first_layer, runner.layers, data)
                self._tell(move.node, part)
        self._drop(message.pipeline)

    def _handover(self, message: wire.Handover) -> None:
        def take() -> None:
            instance = self._instances[message.instance]
            for ticket in message.tickets:
                if ticket.request_id in message.with_kv:
                    self._expect(instance, ticket)
                else:
                    self._add(instance, ticket)
            self._report(wire.Resumed(message.instance, tuple(t.request_id for t in message.tickets)))

        self._when_there(message.instance, take)

    def _expect(self, instance: _Instance, ticket: Ticket) -> None:
        key = (instance.instance, ticket.request_id)
        self._expected.setdefault(key, _Expected(ticket)).ticket = ticket
        self._complete_kv(instance, key)

    def _kv_part(self, part: wire.KvPart) -> None:
        def take() -> None:
            key = (part.instance, part.request_id)
            # The parts may come before the ticket does.
            waiting = self._expected.setdefault(key, _Expected(Ticket(part.request_id, [], 0, 0)))
            waiting.parts[part.first_layer] = part
            self._complete_kv(self._instances[part.instance], key)

        self._when_there(part.instance, take)

    def _complete_kv(self, instance: _Instance, key: tuple[int, int]) -> None:
        waiting = self._expected[key]
        layers = sum(part.layers for part in waiting.parts.values())
        if waiting.ticket.prompt_tokens and layers == instance.runners[0].layers:
            del self._expected[key]
            self._kv[key] = [waiting.parts[first].data for first in sorted(waiting.parts)]
            self._add(instance, waiting.ticket, cached=True)

    def _stop_waiting(self) -> None:
        for key, waiting in list(self._expected.items()):
            if waiting.ticket.prompt_tokens:
                del self._expected[key]
                self._add(self._instances[key[0]], waiting.ticket)
