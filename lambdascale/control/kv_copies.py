"""Prediction of how long copies of KV take, at one mode switch or repartition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from lambdascale.control.batching import BatchLimits
from lambdascale.control.state import Fleet, Instance, ModelState
from lambdascale.core import NodeId, Stage
from lambdascale.core.kv_path import RECEIVERS_COPIES, SENDERS_COPIES, layers_of_part
from lambdascale.core.timing import ComputeModel, Iteration


@dataclass
class _Flow:
    """Bytes from one node to another, and the parts that they are cut to."""

    size_bytes: float = 0.0
    parts: int = 0


class KvCopies:
    """KV that nodes send each other, and the seconds that it takes, as predicted. Nothing else has KV under way.

    A copy takes as long as the busiest NIC that it needs. On the way by places, also as long as messages about them wait for
    iterations, and as the nodes' memory takes for the copies there. ``waiting``: requests that are in no iteration until their KV
    has come.
    """

    def __init__(self, fleet: Fleet, batching: BatchLimits, state: ModelState, waiting: Set[int]) -> None:
        self._fleet, self._batching, self._state, self._waiting = fleet, batching, state, waiting
        self._flows: dict[tuple[NodeId, NodeId], _Flow] = defaultdict(_Flow)

    def add(self, stage: Stage, receiver: NodeId, contexts: Sequence[int]) -> None:
        """Count the KV of contexts in a stage's layers, from its node to another one.

        It is that of all tokens but the last ones, which have not been in an iteration yet.
        """
        flow = self._flows[stage.node, receiver]
        per_token = self._state.spec.kv_bytes_per_token
        flow.size_bytes += share_of(self._state, stage) * per_token * sum(context - 1 for context in contexts)
        flow.parts += sum(self._parts(stage, context - 1) for context in contexts)

    def _parts(self, stage: Stage, tokens: int) -> int:
        spec, place_bytes = self._state.spec, int(self._fleet.cluster.kv_place_bytes)
        blocks = spec.partition(self._state.blocks)
        layers = blocks[stage.last_block].last_layer - blocks[stage.first_block].first_layer + 1
        most = layers_of_part(place_bytes, tokens * spec.kv_bytes_per_token // spec.layers) or layers
        return -(-layers // most)

    def seconds(self, home: NodeId) -> float:
        """Return the time until a node has all that others send it."""
        senders = {src for src, dst in self._flows if dst == home}
        if not senders:
            return 0.0
        into = self._into(home)
        link_s = max(self._nic_s(home, "nic_in", into), *(self._nic_s(src, "nic_out", self._out_of(src)) for src in senders))
        total_s = self._fleet.cluster.link_latency_s + link_s
        if self._fleet.cluster.kv_path == "places":
            total_s += self._grants_s(home, senders, link_s) + self._memory_s(home, RECEIVERS_COPIES * into)
            total_s += max(self._memory_s(src, SENDERS_COPIES * self._out_of(src)) for src in senders)
        return total_s

    def _into(self, node: NodeId) -> float:
        return sum(flow.size_bytes for (_, dst), flow in self._flows.items() if dst == node)

    def _out_of(self, node: NodeId) -> float:
        return sum(flow.size_bytes for (src, _), flow in self._flows.items() if src == node)

    def _nic_s(self, node: NodeId, port: Literal["nic_in", "nic_out"], size_bytes: float) -> float:
        """Seconds for KV through a NIC, beside the blocks that it has still to move: these get an equal part of its rate.

        What is written to places goes ahead of blocks.
        """
        cluster = self._fleet.cluster
        beside = min(size_bytes, self._fleet.traffic.left(node, port)) if cluster.kv_path == "network" else 0
        return (size_bytes + beside) / (cluster.node(node).nic_bytes_per_s * cluster.rdma_efficiency)

    def _memory_s(self, node: NodeId, copied_bytes: float) -> float:
        """Seconds in which a node's memory reads and writes so many bytes, at the rate that its engine reads weights with.

        Assumption: copies of KV reach that rate, and come on top of the network's time instead of partly beside it.
        """
        hardware = self._fleet.cluster.node(node)
        return 2 * copied_bytes / (float(hardware.gpu.hbm_bytes_per_s) * hardware.compute.bandwidth_efficiency)

    # -- waits for iterations ----------------------------------------------------------------------------------------

    def _grants_s(self, home: NodeId, senders: Set[NodeId], link_s: float) -> float:
        """Seconds that messages about places wait beyond what passes while parts are on the link.

        Compute threads read messages between two iterations. The request for places, the first grants and the arrival of the last
        parts wait for half an iteration each. Where more parts come than a node has places, further grants follow: both ends look
        for messages once an iteration, so that a place is granted anew after the longer of their iterations. Meanwhile parts for
        the other places are on the link.
        """
        home_s = self._iteration_s(home)
        senders_s = max(self._iteration_s(node) for node in senders)
        parts = sum(flow.parts for (_, dst), flow in self._flows.items() if dst == home)
        places = self._fleet.cluster.kv_places or parts
        further = -(-parts // places) - 1
        return home_s + senders_s / 2 + further * max(0.0, max(home_s, senders_s) - link_s * (places - 1) / parts)

    def _iteration_s(self, node: NodeId) -> float:
        """Seconds of the longest iteration that a node may be at, 0 if of none."""
        allocation = self._state.allocations.get(node)
        model = ComputeModel(self._fleet.cluster.node(node), self._state.spec)
        longest = 0.0
        for instance in () if allocation is None else allocation.instances.values():
            iteration = self._coming(instance)
            if iteration.prefill_tokens or iteration.decodes:
                share = sum(share_of(self._state, stage) for stage in instance.stages if stage.node == node)
                longest = max(longest, model.iteration_s(iteration, share))
        return longest

    def _coming(self, instance: Instance) -> Iteration:
        """Return an instance's next iteration, with the requests that come from the queue at once."""
        produced = self._fleet.produced
        here = [request for number, request in instance.outstanding.items() if number not in self._waiting]
        decodes = [request.request_id for request in here if request.request_id in produced]
        places = max(0, instance.capacity - len(instance.outstanding))
        prompts = [request.prompt_tokens for request in here if request.request_id not in produced]
        prompts += [request.prompt_tokens for request in islice(self._state.queue, places)]
        tokens = sum(prompts)
        prefill = min(tokens, self._batching.max_tokens)
        attended = prefill * sum(prompt * (prompt + 1) // 2 for prompt in prompts) // tokens if tokens else 0
        return Iteration(prefill, attended, len(decodes), sum(context_of(self._fleet, instance, each) for each in decodes))


def context_of(fleet: Fleet, instance: Instance, request_id: int) -> int:
    """Return a request's prompt and the tokens that it is known to have."""
    return instance.outstanding[request_id].prompt_tokens + fleet.produced[request_id]


def share_of(state: ModelState, stage: Stage) -> float:
    """Return the part of the model that a stage holds."""
    return sum(state.block_bytes[stage.first_block : stage.last_block + 1]) / sum(state.block_bytes)
