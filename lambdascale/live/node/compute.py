"""A node's compute: one thread that runs the stages of its instances, one at a time.

A replica is an instance of one stage. The head of an instance (the node of its first stage when it was started) owns its
batches: it starts their iterations and takes note of the tokens that come back from the last stage. ``ComputeTurns`` decides what
runs next. All state belongs to the worker's thread; others post jobs, which run between two stages.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from lambdascale.control.batching import BatchLimits
from lambdascale.control.turns import ComputeTurns
from lambdascale.core import NodeId, Stage
from lambdascale.core.commands import KvPolicy, Serve
from lambdascale.core.events import CommandFailed
from lambdascale.inference.batch import Batch
from lambdascale.live import wire
from lambdascale.live.node.instance import Head, Instance, SlotData, pass_of, record_ahead
from lambdascale.live.node.memory import await_computed
from lambdascale.live.node.parcels import Parcels
from lambdascale.live.node.places import Tell
from lambdascale.live.node.recent import Recent
from lambdascale.live.node.repartition import Repartitioner
from lambdascale.live.node.runners import Executor
from lambdascale.live.node.starts import Starts
from lambdascale.live.node.switching import MakeKv, Switching
from lambdascale.live.node.worker import NO_INSTANCE, Worker


class Compute:
    """``report`` sends to the controller, ``send`` to other nodes (False if the node is lost); ``vocab`` sizes vocabularies.

    ``parcels`` and ``kv`` make what hidden states and KV go through. ``start()`` runs the thread, ``step()`` a piece of its work.
    """

    def __init__(
        self,
        node: NodeId,
        executor: Executor,
        limits: BatchLimits,
        slot_tokens: int,
        vocab: Callable[[str], int],
        report: Callable[[wire.ToController], None],
        send: Tell,
        parcels: Callable[[Tell], Parcels],
        kv: MakeKv,
    ) -> None:
        self._node = node
        self._limits = limits
        self._slot_tokens = slot_tokens
        self._vocab = vocab
        self._report, self._send = report, send
        self._instances: dict[int, Instance] = {}
        self._ended: Recent[int] = Recent()
        self._early: dict[int, list[wire.ForInstance | SlotData]] = {}  # for instances not yet started here
        self._turns: ComputeTurns[int, wire.Forward] = ComputeTurns()
        # Offers that have come, until the thread takes them: between two stages, or while one runs and is to send to a place.
        self._offers: queue.SimpleQueue[wire.Offer] = queue.SimpleQueue()
        self._parcels = parcels(self._tell)
        self._switching = self._new_switching(kv)
        self._repartitioner = Repartitioner(node, executor, self._tell, self._switching.sender)
        self._starts = Starts(
            executor,
            limits.max_batch,
            slot_tokens,
            self._instances,
            self._switching.sender,
            lambda: self.post(self._start_waiting),
        )
        self._occupied = 0
        self._worker = Worker("compute", self._may_run, self._run_turn, self._failed, self._record_ahead)
        self._handlers: dict[type, Callable[[Instance, Any], None]] = {
            wire.Assign: self._assign,
            wire.Forward: lambda instance, message: self._turns.add_pass(instance.number, message),
            wire.Chosen: self._chosen,
            wire.MoveBatch: self._take_move,
            SlotData: self._repartitioner.take_kv,
            wire.Handover: self._switching.take_over,
            wire.Collect: self._switching.collect,
        }

    def _new_switching(self, kv: MakeKv) -> Switching:
        return Switching(self._instances, self._ended, self._tell, self._report, self._offer, self._drop, kv)

    def start(self) -> None:
        """Run the thread."""
        self._worker.start()

    def step(self) -> bool:
        """Run the jobs posted so far, then one stage; False if nothing was to do."""
        return self._worker.step()

    def close(self) -> None:
        """Stop after the stage that runs now and the jobs posted so far."""
        self._worker.close()
        for number in list(self._instances):
            self._drop(number)
        self._switching.close()

    # -- from any thread ---------------------------------------------------------------------------------------------

    def post(self, job: Callable[[], None], instance: int = NO_INSTANCE) -> Future[None]:
        """Run a job between two stages.

        If it raises, the controller hears of it as a failure of ``instance``, and the future raises the same.
        """
        return self._worker.post(job, instance)

    def serve(self, command: Serve) -> None:
        """Start this node's part of an instance."""
        self.post(lambda: self._start(command), command.instance)

    def repartition(self, message: wire.NewStages) -> None:
        """Serve an instance by new stages from its next iterations on."""
        self.post(lambda: self._new_stages(message), message.command.instance)

    def take(self, message: wire.ForInstance) -> None:
        """Take a message of another node, or requests for an instance whose head is this node."""
        if isinstance(message, wire.Offer):
            self._offers.put(message)
            self.post(self._take_offers, message.instance)
        else:
            self.post(lambda: self._arrive(message), message.instance)

    def stop(self, instance: int) -> Future[None]:
        """Forget an instance and all its requests."""
        return self.post(lambda: self._stop(instance), instance)

    def abort(self, request_id: int) -> None:
        """End a request."""
        self.post(lambda: self._abort(request_id))

    def switch(self, message: wire.Switch) -> None:
        """Dissolve a pipeline whose head is this node."""
        self.post(lambda: self._switch(message), message.command.pipeline)

    def occupy(self, busy: bool) -> Future[None]:
        """Keep the device free for something else: nothing runs until all who took it have given it back."""
        return self.post(lambda: self._occupy(busy))

    def lost(self, peer: NodeId) -> None:
        """Take note that the connection to a node is lost."""
        self.post(lambda: self._lost(peer))

    # -- the thread --------------------------------------------------------------------------------------------------

    def _may_run(self) -> bool:
        return not self._occupied and bool(self._turns)

    def _run_turn(self) -> None:
        """Run the stage, or start the iteration, whose turn it is."""
        turn = self._turns.next()
        assert turn is not None, "a turn is taken when one is due"
        instance = self._instances[turn.instance]
        job = partial(self._begin, instance) if turn.work is None else partial(self._run_pass, instance, turn.work)
        self._worker.guarded(job, turn.instance)

    def _record_ahead(self, urgent: Callable[[], bool]) -> bool:
        """Prepare for iterations to come; False if nothing is to be prepared."""
        return not self._occupied and record_ahead(self._instances.values(), urgent)

    def _failed(self, error: Exception, instance: int) -> None:
        reason = f"node {self._node}: {type(error).__name__}: {error}"
        self._report(wire.Happened(CommandFailed(0.0, "Compute", reason, instance=instance)))

    # -- iterations --------------------------------------------------------------------------------------------------

    def _offer(self, instance: Instance) -> None:
        """Queue an instance for its next iteration if one can start."""
        if instance.head is not None and instance.head.has_work:
            self._turns.add_head(instance.number)

    def _begin(self, instance: Instance) -> None:
        """Start the iteration of the batch whose turn it is."""
        head = instance.head
        index = None if head is None else head.next_batch()
        if head is None or index is None:
            return
        plan = head.batches[index].next()
        if plan is None:
            return
        self._switching.settle(instance, plan.settling)
        head.running[index] = plan
        self._offer(instance)
        version = head.versions[index]
        first = instance.partitions[version].stages[0]
        self._tell(first.node, wire.Forward(instance.number, index, version, 0, pass_of(plan), tuple(plan.tokens)))

    def _run_pass(self, instance: Instance, forward: wire.Forward) -> None:
        """Run a stage and send what comes out of it on."""
        partition = instance.partitions[forward.version]
        inputs = self._parcels.read(forward.inputs) if isinstance(forward.inputs, wire.Landed) else forward.inputs
        output = partition.runners[forward.stage].run(forward.work, inputs)
        if isinstance(output, list):
            self._tell(instance.head_node, wire.Chosen(forward.instance, forward.batch, tuple(output)))
            return
        following = forward.stage + 1
        node = partition.stages[following].node
        await_computed(output)
        self._take_offers()  # a pipeline's first ones come while its first iteration runs
        sent = self._parcels.send(node, forward.instance, forward.batch, output)
        self._tell(node, wire.Forward(forward.instance, forward.batch, forward.version, following, forward.work, sent))

    def _tell(self, node: NodeId, message: wire.Peer) -> bool:
        """Send a message to a node, False if that is lost; this node's own are taken at once."""
        if node != self._node:
            return self._send(node, message)
        assert not isinstance(message, wire.Ready | wire.Rendezvous), "those are the mover's"
        self._take(message)
        return True

    def _chosen(self, instance: Instance, message: wire.Chosen) -> None:
        """Take the tokens of an iteration; the batch may move before its next one."""
        head = instance.head
        plan = None if head is None else head.running.pop(message.batch, None)
        if head is None or plan is None:  # the pipeline has been dissolved: the tokens are redone
            return
        mode = instance.partitions[head.versions[message.batch]].mode
        produced = head.batches[message.batch].complete(plan, message.tokens)
        preempted = tuple(work.request_id for work in plan.iteration.preempted)
        if produced or preempted:
            tokens = tuple(wire.Token(p.request_id, p.index, p.token, p.finished) for p in produced)
            self._report(wire.Tokens(instance.number, mode, tokens, preempted))
        self._move_batches(instance)
        self._offer(instance)

    # -- instances ---------------------------------------------------------------------------------------------------

    def _start(self, command: Serve) -> None:
        """Make runners for this node's stages of a new instance, and take what came for it before; or wait for memory."""
        instance = self._instances[command.instance] = self._starts.instance(command)
        try:
            self._divide(instance, 0, command.stages)
        except Exception as error:
            if not self._starts.wait(command, error):
                self._drop(command.instance)
                raise
            del self._instances[command.instance]
            return
        instance.at = dict.fromkeys(range(instance.batches), 0)
        if instance.head is not None:
            instance.head.versions = [0] * instance.batches
        self._switching.joined(instance.nodes)
        self._take_early(instance)

    def _start_waiting(self) -> None:
        for command in self._starts.take():
            self._worker.guarded(partial(self._start, command), command.instance)

    def _switch(self, message: wire.Switch) -> None:
        self._need_start(message.command.pipeline)
        self._switching.switch(message)

    def _need_start(self, number: int) -> None:
        """Give an instance up that waits for memory, so that the controller takes care of its requests. RuntimeError then."""
        if number in self._starts:
            self._drop(number)
            raise RuntimeError(f"instance {number} has had no room to start before it changes")

    def _new_stages(self, message: wire.NewStages) -> None:
        command = message.command
        self._need_start(command.instance)
        if command.instance in self._ended:
            return
        instance = self._instances.setdefault(command.instance, self._starts.instance(message.first))
        instance.batches, instance.kv_tokens = message.batches, command.kv_tokens
        self._divide(instance, message.version, command.stages, command.kv)
        self._switching.stages_changed(command.instance)
        self._move_batches(instance)
        self._take_early(instance)
        self._drain(instance)
        self._offer(instance)

    def _divide(self, instance: Instance, version: int, stages: tuple[Stage, ...], kv: KvPolicy = "copy") -> None:
        """Add a partition; the head keeps a batch in flight for each of its nodes."""
        self._repartitioner.add(instance, version, stages, kv)
        self._parcels.offer(instance)
        if instance.head_node == self._node:
            if instance.head is None:
                instance.head = Head(partial(self._make_batch, instance))
            instance.head.resize(len({stage.node for stage in stages}), instance.kv_tokens)

    def _make_batch(self, instance: Instance, index: int) -> Batch:
        size, vocab = instance.slots_per_batch, self._vocab(instance.model)
        limits, slots = replace(self._limits, max_batch=size), range(index * size, (index + 1) * size)
        return Batch(limits, slots, self._slot_tokens, vocab, instance.kv_tokens)

    def _arrive(self, message: wire.ForInstance) -> None:
        """Take a message; KV that has been written to this node's memory is copied out first, whatever becomes of it."""
        here = self._switching.arrived(message) if isinstance(message, wire.SlotKv) else message
        if here is not None:
            self._take(here)

    def _take_offers(self) -> None:
        while not self._offers.empty():  # nobody else takes them
            self._take(self._offers.get())

    def _take(self, message: wire.ForInstance | SlotData) -> None:
        """Handle a message of an instance, and what has waited for it; keep it if something else must come first.

        Messages of instances that have ended are dropped, of instances not yet started they wait.
        """
        instance = self._instances.get(message.instance)
        if isinstance(message, wire.OfKv):  # also of instances that have ended, as are the next
            self._switching.take(message)
            if instance is not None:
                self._sent(instance)
            self._starts.room_came()
        elif isinstance(message, wire.Vacate):
            self._parcels.vacated(message)
        elif isinstance(message, wire.Handover) and self._switching.send_on(message):
            pass  # its pipeline has been dissolved meanwhile
        elif instance is not None and isinstance(message, wire.Offer):
            self._parcels.offered(message)
        elif instance is not None:
            instance.hold(message)
            self._drain(instance)
        elif message.instance not in self._ended:
            self._early.setdefault(message.instance, []).append(message)
        elif not isinstance(message, SlotData):
            self._parcels.refuse(message)

    def _sent(self, instance: Instance) -> None:
        """Do what has waited until KV that moves was sent: a node keeps a partition, and collects no pipeline, before."""
        self._parcels.settle(instance)
        self._drain(instance)

    def _drain(self, instance: Instance) -> None:
        while (message := instance.next_held()) is not None:
            self._handlers[type(message)](instance, message)

    def _take_move(self, instance: Instance, message: wire.MoveBatch) -> None:
        self._repartitioner.take_move(instance, message)
        self._parcels.settle(instance)

    def _take_early(self, instance: Instance) -> None:
        for message in self._early.pop(instance.number, ()):
            self._take(message)

    def _assign(self, instance: Instance, message: wire.Assign) -> None:
        for ticket in message.tickets:
            self._switching.add(instance, ticket)
        self._offer(instance)

    def _move_batches(self, instance: Instance) -> None:
        """Bring batches without an iteration under way to the newest partition, and merge those that are too many."""
        for request_id in self._repartitioner.move_batches(instance):
            self._switching.withdraw(instance.number, request_id)
        if instance.head is not None:
            instance.head.merge(instance.newest)

    def _stop(self, number: int) -> None:
        self._switching.stop(number)
        self._drop(number)

    def _drop(self, number: int) -> None:
        self._ended.add(number)
        self._starts.forget(number)
        for message in self._early.pop(number, ()):
            if not isinstance(message, SlotData):
                self._parcels.refuse(message)
        self._turns.remove(number)
        self._switching.forget(number)
        instance = self._instances.pop(number, None)
        if instance is not None:
            instance.close()
            self._parcels.settle(instance)
        self._starts.room_came()

    def _abort(self, request_id: int) -> None:
        for number, instance in self._instances.items():
            ended = True if self._switching.withdraw(number, request_id) else instance.abort(request_id, self._vocab)
            if ended:
                self._report(wire.Aborted(number, request_id))
            if ended is not None:
                return

    def _occupy(self, busy: bool) -> None:
        self._occupied += 1 if busy else -1

    def _lost(self, peer: NodeId) -> None:
        """Drop the instances whose head is lost; requests that wait for KV of the node are prefilled instead."""
        self._parcels.lost(peer)
        self._switching.lost(peer)
        for instance in list(self._instances.values()):
            self._sent(instance)  # nothing is owed to the node any more
        for number, messages in self._early.items():  # its next process lays its places out anew
            self._early[number] = [m for m in messages if not (isinstance(m, wire.Offer) and m.node == peer)]
        ended = [number for number, instance in self._instances.items() if instance.head_node == peer]
        for number in (*ended, *self._starts.led_by(peer)):
            self._drop(number)
        self._switching.prefill_without(peer)
        self._starts.room_came()
