"""Mode switches: a dissolved pipeline's requests go to replicas, with their KV where the policy says so and it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from lambdascale.core import NodeId
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.node.instance import Instance
from lambdascale.live.node.recent import Recent

Tell = Callable[[NodeId, wire.Peer], object]
_Key = tuple[int, int]  # instance, request


def hand_over(pipeline: Instance, switch: wire.Switch, tell: Tell) -> None:
    """Send a pipeline's requests to the heads of their targets, from its own head. Tokens in flight are redone.

    With KV to copy, every node of the pipeline is told to send its layers. The pipeline has no batches afterwards.
    """
    head, command = pipeline.head, switch.command
    assert head is not None, "a pipeline is dissolved at its head"
    moves = [(request_id, target) for request_id, target in command.moves if head.batch_of(request_id) is not None]
    kv_moves = tuple(_kv_moves(pipeline, moves, switch.homes)) if command.kv == "copy" else ()
    with_kv = frozenset(move.request_id for move in kv_moves)
    tickets = {request_id: batch.ticket(request_id) for batch in head.batches for request_id in batch}
    by_target = sorted(moves, key=lambda move: move[1])
    for target, group in groupby(by_target, key=lambda move: move[1]):
        handed = tuple(tickets[request_id] for request_id, _ in group)
        kept = with_kv & {ticket.request_id for ticket in handed}
        tell(switch.homes[target], wire.Handover(target, handed, pipeline.number, kept, pipeline.nodes))
    head.batches, head.running = [], {}
    if command.kv == "copy":
        # This node, the head, is the last: if it fails to collect, the others have been told.
        for node in sorted(pipeline.nodes, key=lambda node: node == pipeline.head_node):
            tell(node, wire.Collect(pipeline.number, kv_moves))


def _kv_moves(pipeline: Instance, moves: Sequence[_Key], homes: dict[int, NodeId]) -> Iterator[wire.KvMove]:
    head = pipeline.head
    for request_id, target in moves:
        index = None if head is None else head.batch_of(request_id)
        if head is None or index is None:
            continue
        batch = head.batches[index]
        slot = batch.cached_slot(request_id)
        if slot is not None:
            tokens = len(batch.ticket(request_id).tokens) - 1
            yield wire.KvMove(request_id, index, head.versions[index], slot, tokens, target, homes[target])


@dataclass(frozen=True)
class KvData:
    """KV of a request of a dissolved pipeline in some layers, on the node of its new ``instance``."""

    instance: int
    request_id: int
    pipeline: int
    layers: range
    data: bytes | torch.Tensor


@dataclass
class _Expected:
    """A request's KV in parts by first layer; ``ticket`` None while the handover has not come."""

    pipeline: int
    ticket: Ticket | None = None
    sources: tuple[NodeId, ...] = ()
    parts: dict[int, KvData] = field(default_factory=dict)


class KvInbox:
    """KV that mode switches bring to this node's instances, until a slot takes it.

    Parts may come before their handover, and after it has been given up: those are dropped, for nobody will ask for them.
    """

    def __init__(self) -> None:
        self._expected: dict[_Key, _Expected] = {}
        self._complete: dict[_Key, list[KvData]] = {}
        self._handed_over: Recent[tuple[int, int]] = Recent()  # pipeline, instance
        self._stopped: Recent[int] = Recent()  # pipelines that the controller has stopped
        self._lost: set[NodeId] = set()

    def __len__(self) -> int:
        """Number of requests with KV here or on its way."""
        return len(self._expected) + len(self._complete)

    def expects(self, instance: int, request_id: int) -> bool:
        """True if a request waits for its KV."""
        found = self._expected.get((instance, request_id))
        return found is not None and found.ticket is not None

    def take_over(self, message: wire.Handover, tickets: Iterable[Ticket]) -> frozenset[int]:
        """Take a handover: return those of ``tickets`` that wait for their KV. Parts for others are late from now on."""
        waiting = frozenset(t.request_id for t in tickets if t.request_id in message.with_kv and self._expect(message, t))
        self._handed_over.add((message.pipeline, message.instance))
        return waiting

    def _expect(self, message: wire.Handover, ticket: Ticket) -> bool:
        """Wait for a request's KV; False if it cannot come any more: a node that has parts is lost, or the pipeline stopped."""
        if message.pipeline in self._stopped or self._lost.intersection(message.sources):
            self._expected.pop((message.instance, ticket.request_id), None)
            return False
        expected = self._expected.setdefault((message.instance, ticket.request_id), _Expected(message.pipeline))
        expected.ticket, expected.sources = ticket, message.sources
        return True

    def put(self, part: KvData) -> None:
        """Keep a part, unless it is late."""
        key = (part.instance, part.request_id)
        late = (part.pipeline, part.instance) in self._handed_over or part.pipeline in self._stopped
        if key not in self._expected:
            if late:
                return
            self._expected[key] = _Expected(part.pipeline)
        self._expected[key].parts[part.layers.start] = part

    def complete(self, instance: int, request_id: int, layers: int) -> Ticket | None:
        """Return the request if its ticket and the KV of all ``layers`` layers have come; None otherwise."""
        key = (instance, request_id)
        expected = self._expected.get(key)
        if expected is None or expected.ticket is None:
            return None
        if sum(len(part.layers) for part in expected.parts.values()) < layers:
            return None
        del self._expected[key]
        self._complete[key] = [expected.parts[first] for first in sorted(expected.parts)]
        return expected.ticket

    def settle(self, instance: Instance, request_id: int, slot: int) -> None:
        """Put the complete KV of a request into a slot. Only an instance that is whole here takes such requests."""
        runner = instance.whole
        assert runner is not None, "KV is brought along to whole instances only"
        for part in self._complete.pop((instance.number, request_id)):
            runner.write_kv(slot, part.layers, part.data)

    def drop(self, instance: int, request_id: int) -> bool:
        """Drop the KV of a request; True if the request was still waiting for it."""
        key = (instance, request_id)
        self._complete.pop(key, None)
        expected = self._expected.pop(key, None)
        return expected is not None and expected.ticket is not None

    def give_up(self, instance: int) -> list[tuple[int, Ticket]]:
        """Wait no longer for an instance's KV; return (instance, request) of those that did."""
        return self._withdraw(lambda key, _: key[0] == instance)

    def lose(self, peer: NodeId) -> list[tuple[int, Ticket]]:
        """Take note that a node is lost; return (instance, request) of those that waited for KV from it."""
        self._lost.add(peer)
        return self._withdraw(lambda _, expected: peer in expected.sources)

    def _withdraw(self, wanted: Callable[[_Key, _Expected], bool]) -> list[tuple[int, Ticket]]:
        """Take out requests that wait for KV. Parts without a handover stay: theirs may still come."""
        found = [(key, e.ticket) for key, e in self._expected.items() if e.ticket is not None and wanted(key, e)]
        for key, _ in found:
            del self._expected[key]
        return [(instance, ticket) for (instance, _), ticket in found]

    def joined(self, nodes: Sequence[NodeId]) -> None:
        """Take note that nodes are alive, which may have been lost before."""
        self._lost.difference_update(nodes)

    def forget(self, instance: int) -> None:
        """Drop everything for an instance that has ended."""
        for table in (self._expected, self._complete):
            for key in [key for key in table if key[0] == instance]:
                del table[key]

    def stop(self, pipeline: int) -> list[tuple[int, Ticket]]:
        """Take note that the controller has stopped a pipeline: no more parts come, nor handovers of those that have.

        Returns (instance, request) of those that waited.
        """
        self._stopped.add(pipeline)
        waited = self._withdraw(lambda _, expected: expected.pipeline == pipeline)
        for key in [key for key, expected in self._expected.items() if expected.pipeline == pipeline]:
            del self._expected[key]
        return waited
