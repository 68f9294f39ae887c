"""Mode switches on a node: requests of its dissolved pipelines leave it, and those of others come, with their KV or without."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from lambdascale.core import NodeId
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.node.instance import Instance, SlotData
from lambdascale.live.node.kv_places import KvSender, KvTraffic
from lambdascale.live.node.mode_switch import KvData, KvInbox, hand_over
from lambdascale.live.node.places import Tell
from lambdascale.live.node.recent import Recent

# Dissolved pipelines whose requests may still be on their way to them.
_REMEMBERED = 64
# From what sends a message, takes KV that has come, and hears of pipelines of which nothing more will come.
MakeKv = Callable[[Tell, Callable[[KvData], None], Callable[[int], None]], KvTraffic]


class Switching:
    """Requests that leave and enter ``instances``. For the compute thread, which has them; ``ended``: numbers of earlier ones.

    ``offer`` queues an instance for its next iteration if one can start, ``drop`` forgets one. ``kv`` makes what KV goes through.
    """

    def __init__(
        self,
        instances: Mapping[int, Instance],
        ended: Recent[int],
        tell: Tell,
        report: Callable[[wire.ToController], None],
        offer: Callable[[Instance], None],
        drop: Callable[[int], None],
        kv: MakeKv,
    ) -> None:
        self._instances, self._ended = instances, ended
        self._tell, self._report = tell, report
        self._offer, self._drop = offer, drop
        self._inbox = KvInbox()
        self._dissolved: OrderedDict[int, wire.Switch] = OrderedDict()  # the last ones, by pipeline
        self._kv = kv(tell, self._kv_came, self._no_more_kv)

    @property
    def sender(self) -> KvSender:
        """The sender of this node's KV to others."""
        return self._kv.sender

    def close(self) -> None:
        """Close the runners of pipelines whose KV is still to be sent."""
        self._kv.sender.close()

    # -- requests that leave -----------------------------------------------------------------------------------------

    def switch(self, message: wire.Switch) -> None:
        """Dissolve a pipeline whose head is this node. Requests that come to it later are sent on."""
        pipeline = self._instances.get(message.command.pipeline)
        if pipeline is not None:
            hand_over(pipeline, message, self._tell)
            self._dissolved[pipeline.number] = message
            if len(self._dissolved) > _REMEMBERED:
                self._dissolved.popitem(last=False)
        if message.command.kv == "recompute":
            self._drop(message.command.pipeline)

    def send_on(self, message: wire.Handover) -> bool:
        """Send requests for a pipeline that is dissolved already to their new instances; False if it is not.

        They were on their way from another pipeline. KV for them is late, so that they are prefilled.
        """
        switch = self._dissolved.get(message.instance)
        if switch is None:
            return False
        targets = dict(switch.command.moves)
        by_target: dict[int, list[Ticket]] = defaultdict(list)
        for ticket in message.tickets:
            if ticket.request_id in targets:
                by_target[targets[ticket.request_id]].append(ticket)
        for target, tickets in by_target.items():
            self._tell(switch.homes[target], wire.Handover(target, tuple(tickets), message.pipeline))
        return True

    def collect(self, pipeline: Instance, message: wire.Collect) -> None:
        """Send this node's KV of a dissolved pipeline."""
        try:
            self._kv.sender.leave(pipeline, message.moves)
        finally:
            self._drop(pipeline.number)

    # -- requests that enter -----------------------------------------------------------------------------------------

    def add(self, instance: Instance, ticket: Ticket, *, cached: bool = False) -> None:
        """Add a request, unless it is here or on its way: it may come twice when a node is lost during a mode switch."""
        if not self._has(instance, ticket.request_id):
            head = instance.head
            assert head is not None, "requests go to the head"
            head.add(ticket, cached=cached)

    def take_over(self, instance: Instance, message: wire.Handover) -> None:
        """Take requests of a dissolved pipeline; tell of the tokens that they bring, ahead of those that follow here."""
        fresh = [t for t in message.tickets if not self._has(instance, t.request_id)]  # others came from the controller
        waiting = self._inbox.take_over(message, () if instance.whole is None else fresh)
        for ticket in fresh:
            if ticket.request_id not in waiting:
                self.add(instance, ticket)
        outputs = {t.request_id: () for t in message.tickets} | {t.request_id: tuple(t.output) for t in fresh}
        self._report(wire.Resumed(message.instance, outputs, waiting))
        for ticket in message.tickets:
            self._complete_kv(instance, ticket.request_id)
        self._offer(instance)

    def settle(self, instance: Instance, settling: Iterable[tuple[int, int]]) -> None:
        """Put the KV that (request, slot) pairs have brought into their slots."""
        for request_id, slot in settling:
            self._inbox.settle(instance, request_id, slot)

    def withdraw(self, instance: int, request_id: int) -> bool:
        """Forget the KV of a request; True if the request waited for it, and so is in no batch."""
        return self._inbox.drop(instance, request_id)

    def stages_changed(self, instance: int) -> None:
        """Prefill the requests of an instance that wait for KV: its stages change."""
        self._prefill(self._inbox.give_up(instance))

    def take(self, message: wire.OfKv) -> None:
        """Take a message of another node about KV."""
        self._kv.take(message)

    def arrived(self, part: wire.SlotKv) -> SlotData | None:
        """Copy out KV for a batch that moves. None if it is void."""
        return self._kv.arrived(part)

    # -- ends --------------------------------------------------------------------------------------------------------

    def joined(self, nodes: Sequence[NodeId]) -> None:
        """Take note that nodes are alive."""
        self._inbox.joined(nodes)

    def lost(self, peer: NodeId) -> None:
        """Take note that a node is lost: nothing goes there any more."""
        self._kv.lost(peer)

    def prefill_without(self, peer: NodeId) -> None:
        """Prefill the requests that wait for KV of a lost node, once the instances that end with it are dropped."""
        self._prefill(self._inbox.lose(peer))

    def stop(self, number: int) -> None:
        """Send and expect no more of a pipeline's KV."""
        self._no_more_kv(number)
        self._kv.sender.stop(number)

    def forget(self, number: int) -> None:
        """Drop the KV for an instance that has ended, and what its batches' moves have still to send."""
        self._inbox.forget(number)
        self._kv.sender.forget(number)

    # -- KV ----------------------------------------------------------------------------------------------------------

    def _has(self, instance: Instance, request_id: int) -> bool:
        here = instance.head is not None and instance.head.batch_of(request_id) is not None
        return here or self._inbox.expects(instance.number, request_id)

    def _prefill(self, withdrawn: Iterable[tuple[int, Ticket]]) -> None:
        """Add requests that wait for their KV no more."""
        for number, ticket in withdrawn:
            self.add(self._instances[number], ticket)
            self._report(wire.Resumed(number, {ticket.request_id: ()}))
            self._offer(self._instances[number])

    def _no_more_kv(self, pipeline: int) -> None:
        """Prefill the requests that wait for KV of a dissolved pipeline."""
        self._prefill(self._inbox.stop(pipeline))

    def _kv_came(self, kv: KvData) -> None:
        if kv.instance not in self._ended:
            self._inbox.put(kv)
        instance = self._instances.get(kv.instance)
        if instance is not None:
            self._complete_kv(instance, kv.request_id)
            self._offer(instance)

    def _complete_kv(self, instance: Instance, request_id: int) -> None:
        runner = instance.whole
        ticket = None if runner is None else self._inbox.complete(instance.number, request_id, len(runner.layers))
        if ticket is not None:
            self.add(instance, ticket, cached=True)
            self._report(wire.Resumed(instance.number, {request_id: ()}))
