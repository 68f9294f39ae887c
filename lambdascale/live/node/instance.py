"""One node's part of an instance: its partitions with their runners and, at the head, the batches.

An instance begins with partition 0, and every Repartition adds the next. A batch runs on one partition at a time and moves to the
newest between two iterations, so that batches of one instance may be on several. A node keeps a partition until every batch has
left it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from lambdascale.core import NodeId
from lambdascale.core.commands import KvPolicy
from lambdascale.core.events import Mode
from lambdascale.core.plan import Stage
from lambdascale.inference.batch import Batch, BatchPlan, Ticket
from lambdascale.live import wire
from lambdascale.live.node.runners import Runner

Place = tuple[int, int]  # of KV on its way: slot, layer


@dataclass(frozen=True)
class SlotData:
    """KV of a slot of ``batch`` in some layers, for partition ``version``, as it has come to this node."""

    instance: int
    batch: int
    version: int
    slot: int
    layers: range
    data: bytes | torch.Tensor


@dataclass(frozen=True)
class Partition:
    """The stages of an instance, and the runners of those on this node by their index.

    ``kv``: the policy by which requests bring their KV from the partition before.
    """

    stages: tuple[Stage, ...]
    runners: dict[int, Runner]
    kv: KvPolicy = "copy"

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """The distinct nodes of the stages, in order of first appearance."""
        return tuple(dict.fromkeys(stage.node for stage in self.stages))

    @property
    def mode(self) -> Mode:
        """Mode of what it serves: local with one stage, else pipeline."""
        return "local" if len(self.stages) == 1 else "pipeline"


class Head:
    """The batches of an instance at the node that owns them: the node of its first stage when it was started.

    Every partition keeps as many batches in flight as it has nodes (reference, section 2.4). Batches beyond that number are
    merged into the others. ``make_batch`` makes the batch of an index, in its own KV slots.
    """

    def __init__(self, make_batch: Callable[[int], Batch]) -> None:
        self._make_batch = make_batch
        self.batches: list[Batch] = []
        self.versions: list[int] = []  # the partition each batch runs on
        self.running: dict[int, BatchPlan] = {}
        self._in_flight = 0
        self._last = -1

    def resize(self, in_flight: int, kv_tokens: int) -> None:
        """Keep so many batches in flight from now on, each with so much KV; new ones have no partition yet (-1)."""
        self._in_flight = in_flight
        for batch in self.batches:
            batch.limit(kv_tokens)
        for index in range(len(self.batches), in_flight):
            self.batches.append(self._make_batch(index))
            self.versions.append(-1)

    def add(self, ticket: Ticket, *, cached: bool = False) -> None:
        """Give a request to the batch that has the fewest."""
        min((self.batches[index] for index in self._open), key=len).add(ticket, cached=cached)

    @property
    def _open(self) -> list[int]:
        """Batches that take requests: not more than are in flight, and none whose slots another has borrowed."""
        borrowed = {slot for batch in self.batches for slot in batch.borrowed}
        return [index for index in range(self._in_flight) if borrowed.isdisjoint(self.batches[index].slots)]

    def merge(self, version: int) -> None:
        """Merge batches that are too many, and have moved to partition ``version``, into others that have."""
        for index in self.idle:
            targets = [target for target in self._open if self.versions[target] == version]
            if index >= self._in_flight and len(self.batches[index]) and targets:
                min((self.batches[target] for target in targets), key=len).absorb(self.batches[index])

    def batch_of(self, request_id: int) -> int | None:
        """Return the index of the batch that has a request."""
        return next((index for index, batch in enumerate(self.batches) if request_id in batch), None)

    def abort(self, request_id: int, vocab: int) -> bool | None:
        """End a request; None if no batch has it, False if it ends with the token of the iteration under way instead."""
        index = self.batch_of(request_id)
        if index is None:
            return None
        if index in self.running:
            self.batches[index].ticket(request_id).stop_tokens = frozenset(range(vocab))
            return False
        self.batches[index].take(request_id)
        return True

    @property
    def idle(self) -> list[int]:
        """Batches without an iteration under way."""
        return [index for index in range(len(self.batches)) if index not in self.running]

    @property
    def has_work(self) -> bool:
        """True if a batch could start an iteration."""
        return any(len(self.batches[index]) for index in self.idle)

    def next_batch(self) -> int | None:
        """Return the batch whose turn it is to start an iteration: in a circle, those without requests left out."""
        waiting = [index for index in self.idle if len(self.batches[index])]
        if not waiting:
            return None
        self._last = next((index for index in waiting if index > self._last), waiting[0])
        return self._last


def pass_of(plan: BatchPlan) -> wire.Pass:
    """Return a planned iteration as the stages hand it on."""
    i = plan.iteration
    sizes = i.prefill_tokens, i.context_tokens, i.attended_tokens
    return wire.Pass(plan.batch, *sizes, tuple(plan.rules), tuple(plan.positions))


@dataclass
class Instance:
    """``head_node`` owns the batches; ``head`` has them if that is this node.

    ``batches`` is the largest number of them so far, each with ``slots_per_batch`` KV slots (the same on all nodes, as long as
    the instance lives) and ``kv_tokens`` tokens of KV in them; ``at`` is the partition that each is on as far as this node knows.
    ``owing``: moves from each partition of whose KV this node has still to send some.
    """

    number: int
    model: str
    head_node: NodeId
    slots_per_batch: int
    kv_tokens: int
    batches: int = 0
    head: Head | None = None
    partitions: dict[int, Partition] = field(default_factory=dict)
    at: dict[int, int] = field(default_factory=dict)
    owing: Counter[int] = field(default_factory=Counter)
    _nodes: dict[NodeId, None] = field(default_factory=dict)
    _held: list[wire.ForInstance | SlotData] = field(default_factory=list)
    _missing: dict[int, set[Place]] = field(default_factory=dict)
    _came: dict[tuple[int, int], set[Place]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Count the head among the nodes: it may have no stage in later partitions."""
        self._nodes[self.head_node] = None

    @property
    def is_pipeline(self) -> bool:
        """True if one of its partitions has several stages."""
        return any(len(partition.stages) > 1 for partition in self.partitions.values())

    @property
    def newest(self) -> int:
        """Number of the newest partition, -1 without any."""
        return max(self.partitions, default=-1)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """The head and all nodes that have or had stages."""
        return tuple(self._nodes)

    def add(self, version: int, partition: Partition) -> None:
        """Add a partition."""
        self.partitions[version] = partition
        self._nodes |= dict.fromkeys(partition.nodes)

    @property
    def whole(self) -> Runner | None:
        """The runner that has the whole model at the head, in the newest partition; None if no runner has it."""
        newest = self.partitions[self.newest]
        return newest.runners.get(0) if self.head is not None and len(newest.stages) == 1 else None

    def abort(self, request_id: int, vocab: Callable[[str], int]) -> bool | None:
        """End a request, if this node is the head; see Head. ``vocab`` gives the size of a model's vocabulary."""
        return None if self.head is None else self.head.abort(request_id, vocab(self.model))

    # -- the order of messages ---------------------------------------------------------------------------------------

    def hold(self, message: wire.ForInstance | SlotData) -> None:
        """Keep a message until what it builds on has happened: messages of different senders overtake each other."""
        self._held.append(message)

    def next_held(self) -> wire.ForInstance | SlotData | None:
        """Take out the first message that can be handled now; or None."""
        moved: set[int] = set()
        for place, message in enumerate(self._held):
            if self._can_take(message, moved):
                return self._held.pop(place)
            if isinstance(message, wire.MoveBatch):
                moved.add(message.batch)
        return None

    def _can_take(self, message: wire.ForInstance | SlotData, held_back: set[int]) -> bool:
        """True if nothing that the message builds on is still to come.

        A pass runs when its batch is on its partition with all KV; KV needs the partition; a batch leaves a partition that it
        has reached (``held_back``: batches with an earlier move that waits); a pipeline is collected when its KV is complete and
        none of it is owed to another node.
        """
        if isinstance(message, wire.Forward):
            return self.ready(message.batch, message.version, (segment.slot for segment in message.work.batch.segments))
        if isinstance(message, SlotData):
            return message.version in self.partitions
        if isinstance(message, wire.MoveBatch):
            return message.version in self.partitions and message.batch not in held_back and self._may_leave(message)
        if isinstance(message, wire.Collect):
            complete = all(self.ready(m.batch, m.version, [m.slot]) for m in message.moves if self._has_stage(m.version))
            return complete and not held_back and not self.owing
        return True

    def _may_leave(self, move: wire.MoveBatch) -> bool:
        if move.before == move.version or not self._has_stage(move.before):
            return True
        return self.ready(move.batch, move.before, (slot for slot, _ in move.kv))

    def _has_stage(self, version: int) -> bool:
        return version in self.partitions and bool(self.partitions[version].runners)

    # -- batches on partitions ---------------------------------------------------------------------------------------

    def ready(self, batch: int, version: int, slots: Iterable[int]) -> bool:
        """True if a batch is on a partition here, with all KV that the stages on this node need.

        ``slots`` of other batches hold requests absorbed from them: their KV came to the partition with the other batch, which
        may be ahead since.
        """
        owners = {batch, *(slot // self.slots_per_batch for slot in slots)}
        return all(self.at.get(owner, -1) >= version and not self._missing.get(owner) for owner in owners)

    def moved(self, batch: int, version: int, expected: set[Place]) -> None:
        """Take note that a batch is on a partition, and of the KV that others send for it."""
        self.at[batch] = version
        self._missing[batch] = expected - self._came.pop((batch, version), set())

    def kv_came(self, batch: int, version: int, places: Iterable[Place]) -> None:
        """Take note of KV from another node, which may come before its batch has moved."""
        if self.at.get(batch) == version:
            self._missing[batch].difference_update(places)
        else:
            self._came.setdefault((batch, version), set()).update(places)

    def owe(self, version: int) -> None:
        """Keep a partition until this node has sent what a move takes from it."""
        self.owing[version] += 1

    def paid(self, version: int) -> None:
        """Take note that this node has sent what a move takes from a partition, or will not."""
        self.owing[version] -= 1
        self.owing = +self.owing
        self.drop_unused()

    def drop_unused(self) -> None:
        """Close the runners of partitions that every batch has left, and all KV that goes to other nodes."""
        oldest = min((*(self.at.get(batch, 0) for batch in range(self.batches)), *self.owing), default=0)
        self._close([version for version in self.partitions if version < oldest])

    def close(self) -> None:
        """Close all runners."""
        self._close(list(self.partitions))

    def take_runners(self) -> list[Runner]:
        """Take out all partitions; return their runners, which the caller closes."""
        return self._take_out(list(self.partitions))

    def _close(self, versions: Sequence[int]) -> None:
        for runner in self._take_out(versions):
            runner.close()

    def _take_out(self, versions: Sequence[int]) -> list[Runner]:
        """Take out partitions; return the runners that no other one has."""
        dropped = [runner for version in versions for runner in self.partitions.pop(version).runners.values()]
        kept = {id(runner) for part in self.partitions.values() for runner in part.runners.values()}
        return list({id(runner): runner for runner in dropped if id(runner) not in kept}.values())


def record_ahead(instances: Iterable[Instance], urgent: Callable[[], bool]) -> bool:
    """Have the runner of a replica prepare for iterations to come; False if none has anything to prepare.

    A stage of a pipeline has spare time between any two passes, and none of them is to be delayed.
    """
    replicas = [instance.whole for instance in instances if instance.partitions]
    return any(runner.record_ahead(urgent) for runner in replicas if runner is not None)
