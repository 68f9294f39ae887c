"""Partitions of instances: runners for a node's stages, and the moves of batches from one partition to the next.

The controller tells every node concerned of the new stages; each makes its runners. The head moves a batch when it has no
iteration under way: it names the slots whose KV goes along, every node of the old stages sends the layers that others take over,
and every node of the new stages runs the batch's passes once the KV of its layers is complete. Nothing is acknowledged: stages
before and after tell each node what to send and what to wait for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from lambdascale.core import NodeId
from lambdascale.core.commands import KvPolicy
from lambdascale.core.plan import Stage
from lambdascale.live import wire
from lambdascale.live.node.instance import Instance, Partition, SlotData
from lambdascale.live.node.kv_places import KvSender, Part
from lambdascale.live.node.runners import Executor, Runner


class Repartitioner:
    """``tell`` sends to any node, this one too; ``sender`` sends KV."""

    def __init__(self, node: NodeId, executor: Executor, tell: Callable[[NodeId, wire.Peer], object], sender: KvSender) -> None:
        self._node = node
        self._executor = executor
        self._tell = tell
        self._sender = sender

    def add(self, instance: Instance, version: int, stages: tuple[Stage, ...], kv: KvPolicy = "copy") -> None:
        """Add a partition with runners for this node's stages.

        A stage that stays as it was keeps its runner, and so its KV. Raises what the executor raises, and leaves no runner then.
        """
        slots = instance.batches * instance.slots_per_batch
        kept = self._kept(instance, slots)
        runners: dict[int, Runner] = {}
        try:
            for index, stage in enumerate(stages):
                if stage.node == self._node:
                    runners[index] = kept.get(stage) or self._make(instance.model, stage, slots)
        except BaseException:
            for runner in runners.values():
                if runner not in kept.values():
                    runner.close()
            raise
        instance.add(version, Partition(stages, runners, kv))

    def _make(self, model: str, stage: Stage, slots: int) -> Runner:
        return self._executor.runner(model, stage.first_block, stage.last_block, slots)

    @staticmethod
    def _kept(instance: Instance, slots: int) -> dict[Stage, Runner]:
        """Runners of the newest partition with enough slots, by stage."""
        newest = instance.partitions.get(instance.newest)
        if newest is None:
            return {}
        return {newest.stages[index]: runner for index, runner in newest.runners.items() if runner.slots >= slots}

    # -- at the head -------------------------------------------------------------------------------------------------

    def move_batches(self, instance: Instance) -> list[int]:
        """Move the batches without an iteration under way to the newest partition.

        Return the requests that waited with KV brought along from elsewhere: they are prefilled instead.
        """
        head = instance.head
        if head is None:
            return []
        behind = [index for index in head.idle if head.versions[index] != instance.newest]
        return [request_id for index in behind for request_id in self._move(instance, index)]

    def _move(self, instance: Instance, index: int) -> list[int]:
        head, version = instance.head, instance.newest
        assert head is not None, "batches are moved by their head"
        batch, before = head.batches[index], head.versions[index]
        uncached = batch.uncache()
        if instance.partitions[version].kv == "recompute":
            batch.recompute()
        head.versions[index] = version
        # A new batch comes from nowhere: as if from the partition itself.
        before = version if before < 0 else before
        stages_before = instance.partitions[before].stages
        message = wire.MoveBatch(instance.number, index, before, stages_before, version, tuple(batch.kv_slots()))
        for node in instance.nodes:
            self._tell(node, message)
        return uncached

    # -- at every node -----------------------------------------------------------------------------------------------

    def take_move(self, instance: Instance, move: wire.MoveBatch) -> None:
        """Send the KV that other nodes take over, copy what stays here, and note what others send."""
        after = instance.partitions[move.version].stages
        parts: dict[NodeId, list[Part]] = defaultdict(list)
        for old_index, old, new_index, new in _pairs(move.stages_before, after):
            if old.node == self._node and move.kv:
                layers = self._shared_layers(instance.model, old, new)
                source = instance.partitions[move.before].runners[old_index]
                if new.node == self._node:
                    _copy(source, instance.partitions[move.version].runners[new_index], move.kv, layers)
                else:
                    parts[new.node] += self._parts(source, move, layers)
        expected = {
            (slot, layer)
            for _, old, _, new in _pairs(move.stages_before, after)
            if new.node == self._node and old.node != self._node
            for layer in self._shared_layers(instance.model, old, new)
            for slot, _ in move.kv
        }
        instance.moved(move.batch, move.version, expected)
        if parts:
            # What the batch leaves behind stays as it is: no later iteration writes to its slots in that partition.
            instance.owe(move.before)
            self._sender.send(instance.number, parts, partial(instance.paid, move.before))
        instance.drop_unused()

    def _parts(self, source: Runner, move: wire.MoveBatch, layers: range) -> Iterator[Part]:
        for slot, tokens in move.kv:

            def message(part: Part, data: bytes | wire.Landed, grant: int, slot: int = slot) -> wire.Peer:
                first, count = part.layers.start, len(part.layers)
                return wire.SlotKv(move.instance, move.batch, move.version, slot, first, count, data, grant)

            yield from self._sender.parts(source, layers, slot, tokens, message)

    def take_kv(self, instance: Instance, part: SlotData) -> None:
        """Write KV that another node had."""
        layers = part.layers
        runners = instance.partitions[part.version].runners.values()
        taking = [runner for runner in runners if layers.start in runner.layers]
        assert len(taking) == 1, f"layers {layers} of instance {instance.number} were sent to node {self._node}, which lacks them"
        taking[0].write_kv(part.slot, layers, part.data)
        instance.kv_came(part.batch, part.version, {(part.slot, layer) for layer in layers})

    def _shared_layers(self, model: str, old: Stage, new: Stage) -> range:
        first, last = max(old.first_block, new.first_block), min(old.last_block, new.last_block)
        return self._executor.layers(model, first, last)


def _pairs(before: Sequence[Stage], after: Sequence[Stage]) -> Iterator[tuple[int, Stage, int, Stage]]:
    """Yield every old stage with every new one that has some of its blocks, with their indices."""
    for old_index, old in enumerate(before):
        for new_index, new in enumerate(after):
            if old.first_block <= new.last_block and new.first_block <= old.last_block:
                yield old_index, old, new_index, new


def _copy(source: Runner, destination: Runner, kv: Sequence[tuple[int, int]], layers: range) -> None:
    """Copy KV within the node; a runner that was kept has it already."""
    if source is destination:
        return
    for slot, tokens in kv:
        destination.write_kv(slot, layers, source.read_kv(slot, tokens, layers))
