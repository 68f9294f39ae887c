"""Choice between copying and recomputing the KV of requests that change nodes: the one that lets them wait less, as predicted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from itertools import islice
from typing import Literal

from lambdascale.control.batching import BatchLimits
from lambdascale.control.state import Fleet, Instance, ModelState
from lambdascale.core import NodeId, Stage
from lambdascale.core.commands import KvPolicy
from lambdascale.core.timing import ComputeModel, Iteration

# "cheapest": decided anew for each mode switch and each moved boundary.
KvRule = Literal["recompute", "copy", "cheapest"]
_Flows = Mapping[tuple[NodeId, NodeId], float]  # bytes by sender and receiver


class KvChoice:
    """The way that KV takes, by ``rule``. With "cheapest" it is chosen by predicted waiting, in seconds times requests.

    A copy keeps those waiting whose KV is on its way: as long as the busiest NIC that it needs takes, and as messages about
    places for it wait for iterations. Where KV would go in messages, whose rate is not known, it is recomputed. A recomputation
    keeps everything waiting that runs on its node, by as much as it takes longer than a decode: like that it ends with a token.
    Ties are recomputed, which needs nothing of the network.

    Contexts count with the tokens that the control plane has heard of: backends report a request's first token, and need not
    report later ones. Both ways take longer in proportion to those. Requests without a token are prefilled either way.
    """

    def __init__(self, fleet: Fleet, rule: KvRule, batching: BatchLimits) -> None:
        self._fleet = fleet
        self._rule = rule
        self._batching = batching

    def at_switch(self, state: ModelState, pipeline: Instance, moves: Sequence[tuple[int, int]]) -> KvPolicy:
        """Choose for a dissolved pipeline whose requests are with their targets already. Targets that are pipelines recompute."""
        if (fixed := self._fixed()) is not None:
            return fixed
        contexts: dict[int, list[int]] = defaultdict(list)
        for request_id, target in moves:
            if request_id in self._fleet.produced and not state.instances[target].is_pipeline:
                contexts[target].append(self._context(pipeline, request_id))
        flows: dict[tuple[NodeId, NodeId], float] = defaultdict(float)
        for target, each in contexts.items():
            home = state.instances[target].nodes[0]
            for stage in pipeline.stages:
                if stage.node != home:
                    flows[stage.node, home] += _kv_bytes(state, stage, each)
        moved = {request_id for request_id, _ in moves if request_id in self._fleet.produced}
        copied = recomputed = 0.0
        for target, each in contexts.items():
            stages, running = state.instances[target].stages, len(state.instances[target].outstanding)
            copied += len(each) * (self._copy_s(flows, stages[0].node) + self._grants_s(state, flows, stages[0].node, moved))
            recomputed += running * self._recompute_s(state, stages, each, running)
        return "copy" if copied < recomputed else "recompute"

    def at_repartition(self, state: ModelState, instance: Instance, stages: Sequence[Stage]) -> KvPolicy:
        """Choose for an instance that is to move to ``stages``: all its requests wait, whichever way it is."""
        if (fixed := self._fixed()) is not None:
            return fixed
        contexts = [self._context(instance, request) for request in instance.outstanding if request in self._fleet.produced]
        if not contexts:
            return "recompute"
        flows: dict[tuple[NodeId, NodeId], float] = defaultdict(float)
        for old in instance.stages:
            for new in stages:
                first, last = max(old.first_block, new.first_block), min(old.last_block, new.last_block)
                if first <= last and old.node != new.node:
                    flows[old.node, new.node] += _kv_bytes(state, Stage(new.node, first, last), contexts)
        copied = max((self._copy_s(flows, stage.node) for stage in stages), default=0.0)
        recomputed = self._recompute_s(state, stages, contexts, len(instance.outstanding))
        return "copy" if copied < recomputed else "recompute"

    def _fixed(self) -> KvPolicy | None:
        """Return the way that is taken without a prediction, None if one decides."""
        if self._rule != "cheapest":
            return self._rule
        return "recompute" if self._fleet.cluster.kv_path == "messages" else None

    def _context(self, instance: Instance, request_id: int) -> int:
        return instance.outstanding[request_id].prompt_tokens + self._fleet.produced[request_id]

    def _copy_s(self, flows: _Flows, home: NodeId) -> float:
        """Seconds until a node has all that others send it: the busiest of the NICs in question decides."""
        senders = {src for src, dst in flows if dst == home}
        if not senders:
            return 0.0
        out = (self._nic_s(src, "nic_out", sum(size for (other, _), size in flows.items() if other == src)) for src in senders)
        into = self._nic_s(home, "nic_in", sum(size for (_, dst), size in flows.items() if dst == home))
        return self._fleet.cluster.link_latency_s + max(into, *out)

    def _grants_s(self, state: ModelState, flows: _Flows, home: NodeId, moved: Set[int]) -> float:
        """Seconds that three messages wait for iterations: the request for places, their grant, and the last part's arrival.

        Compute threads read them between two iterations; a grant comes to every sender. Waits for further grants pass while other
        parts are under way.
        """
        senders = {src for src, dst in flows if dst == home}
        if self._fleet.cluster.kv_path != "places" or not senders:
            return 0.0
        return 2 * self._turn_s(state, home, moved) + max(self._turn_s(state, node, moved) for node in senders)

    def _turn_s(self, state: ModelState, node: NodeId, moved: Set[int]) -> float:
        """Mean seconds that a message to a node waits: half of the longest iteration that the node may be at, 0 if of none.

        Requests that have ``moved`` with their KV are in none yet.
        """
        allocation = state.allocations.get(node)
        model = ComputeModel(self._fleet.cluster.node(node), state.spec)
        longest = 0.0
        for instance in () if allocation is None else allocation.instances.values():
            iteration = self._coming(state, instance, moved)
            if iteration.prefill_tokens or iteration.decodes:
                share = sum(_share(state, stage) for stage in instance.stages if stage.node == node)
                longest = max(longest, model.iteration_s(iteration, share))
        return longest / 2

    def _coming(self, state: ModelState, instance: Instance, moved: Set[int]) -> Iteration:
        """Return an instance's next iteration, with the requests that come from the queue at once."""
        here = [request for number, request in instance.outstanding.items() if number not in moved]
        decodes = [request.request_id for request in here if request.request_id in self._fleet.produced]
        places = max(0, instance.capacity - len(instance.outstanding))
        prompts = [request.prompt_tokens for request in here if request.request_id not in self._fleet.produced]
        prompts += [request.prompt_tokens for request in islice(state.queue, places)]
        tokens = sum(prompts)
        prefill = min(tokens, self._batching.max_tokens)
        attended = prefill * sum(prompt * (prompt + 1) // 2 for prompt in prompts) // tokens if tokens else 0
        return Iteration(prefill, attended, len(decodes), sum(self._context(instance, number) for number in decodes))

    def _nic_s(self, node: NodeId, port: Literal["nic_in", "nic_out"], size_bytes: float) -> float:
        """Seconds for KV through a NIC, beside the blocks that it has still to move: these get an equal part of its rate.

        What is written to places goes ahead of blocks.
        """
        cluster = self._fleet.cluster
        beside = min(size_bytes, self._fleet.traffic.left(node, port)) if cluster.kv_path == "network" else 0
        return (size_bytes + beside) / (cluster.node(node).nic_bytes_per_s * cluster.rdma_efficiency)

    def _recompute_s(self, state: ModelState, stages: Sequence[Stage], contexts: Sequence[int], running: int) -> float:
        """Seconds by which a prefill of contexts on ``stages`` takes longer than a decode of the requests ``running`` there.

        They are divided among as many batches as the stages have in flight.
        """
        nodes = len({stage.node for stage in stages})
        batches = nodes * state.spec.gpus_per_replica
        tokens, attended = sum(contexts), sum(context * (context + 1) // 2 for context in contexts)
        decode = Iteration(decodes=-(-running // batches), context_tokens=tokens // batches)
        prefill_s: dict[NodeId, float] = defaultdict(float)
        decode_s = 0.0
        for stage in stages:
            share = _share(state, stage)
            model = ComputeModel(self._fleet.cluster.node(stage.node), state.spec)
            prefill_s[stage.node] += self._iterations_s(model, -(-tokens // batches), attended // batches, share)
            decode_s += model.iteration_s(decode, share)
        return max(0.0, sum(prefill_s.values()) + (nodes - 1) * max(prefill_s.values()) - decode_s)

    def _iterations_s(self, model: ComputeModel, tokens: int, attended: int, share: float) -> float:
        """Seconds for iterations that prefill so many tokens, each as many as one may have."""
        most = self._batching.max_tokens
        sizes = [most] * (tokens // most) + [tokens % most] * (tokens % most > 0)
        return sum(model.iteration_s(Iteration(size, attended * size // tokens), share) for size in sizes)


def _kv_bytes(state: ModelState, stage: Stage, contexts: Sequence[int]) -> float:
    """Bytes of KV in a stage's layers: of all tokens but the last ones, which have not been in an iteration yet."""
    return _share(state, stage) * state.spec.kv_bytes_per_token * sum(context - 1 for context in contexts)


def _share(state: ModelState, stage: Stage) -> float:
    return sum(state.block_bytes[stage.first_block : stage.last_block + 1]) / sum(state.block_bytes)
