"""Starts of instances on a node: the KV slots that they agree on, and starts that wait for the memory of pipelines.

A node that has become complete starts its replica just before its pipeline is dissolved, and the pipeline keeps its KV until that
has been sent: for a moment both have to fit. Where they do not, the replica waits, and with it what has come for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from torch import OutOfMemoryError

from lambdascale.core import NodeId
from lambdascale.core.commands import Serve
from lambdascale.live.node.instance import Instance
from lambdascale.live.node.kv_places import KvSender
from lambdascale.live.node.runners import Executor
from lambdascale.live.node_memory import batch_slots


class Starts:
    """Starts of ``instances``, those that have begun. For the compute thread, which has them; ``sender``: of their KV.

    ``most``: KV slots of a batch, of ``slot_tokens`` tokens each. ``retry`` is called when waiting starts may have room.
    """

    def __init__(
        self,
        executor: Executor,
        most: int,
        slot_tokens: int,
        instances: Mapping[int, Instance],
        sender: KvSender,
        retry: Callable[[], object],
    ) -> None:
        self._executor, self._most, self._slot_tokens = executor, most, slot_tokens
        self._instances, self._sender, self._retry = instances, sender, retry
        self._waiting: dict[int, Serve] = {}

    def __contains__(self, instance: int) -> bool:
        """True if the instance waits."""
        return instance in self._waiting

    def instance(self, first: Serve) -> Instance:
        """Return an instance that begins with ``first``, without partitions. All its nodes find the same number of slots."""
        layers = Counter[NodeId]()
        for stage in first.stages:
            layers[stage.node] += len(self._executor.layers(first.model, stage.first_block, stage.last_block))
        slots = self._most
        if self._executor.reserves:
            slots = batch_slots(slots, first.kv_tokens, self._slot_tokens, list(layers.values()))
        return Instance(first.instance, first.model, first.stages[0].node, slots, first.kv_tokens, len(layers))

    def wait(self, command: Serve, error: Exception) -> bool:
        """Keep a start that has failed with ``error`` if it is for want of memory, and some will come free; else return False.

        Memory comes from pipelines of the model: each is dissolved when its nodes are complete, at the latest.
        """
        pipelines = (i for i in self._instances.values() if i.model == command.model and i.is_pipeline)
        waits = isinstance(error, OutOfMemoryError) and (self._sender.dissolved or any(pipelines))
        if waits:
            self._waiting[command.instance] = command
        return waits

    def room_came(self) -> None:
        """Take note that an instance has ended, or KV has been sent: retry, unless more KV is to be sent."""
        if self._waiting and not self._sender.dissolved:
            self._retry()

    def take(self) -> list[Serve]:
        """Take out all that wait."""
        waiting, self._waiting = self._waiting, {}
        return list(waiting.values())

    def led_by(self, node: NodeId) -> list[int]:
        """Return the instances that wait and have their head on a node."""
        return [number for number, command in self._waiting.items() if command.stages[0].node == node]

    def forget(self, instance: int) -> None:
        """Wait no more with an instance."""
        self._waiting.pop(instance, None)
