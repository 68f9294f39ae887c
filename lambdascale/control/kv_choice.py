"""Choice between copying and recomputing the KV of requests that change nodes: the one that lets them wait less, as predicted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from lambdascale.control.batching import BatchLimits
from lambdascale.control.kv_copies import KvCopies, context_of, share_of
from lambdascale.control.state import Fleet, Instance, ModelState
from lambdascale.core import NodeId, Stage
from lambdascale.core.commands import KvPolicy
from lambdascale.core.timing import ComputeModel, Iteration

# "cheapest": decided anew for each mode switch and each moved boundary.
KvRule = Literal["recompute", "copy", "cheapest"]


class KvChoice:
    """The way that KV takes, by ``rule``. With "cheapest" it is chosen by predicted waiting, in seconds times requests.

    A copy keeps those waiting whose KV is on its way: see KvCopies. Where KV would go in messages, whose rate is not known, it is
    recomputed. A recomputation keeps everything waiting that runs on its node, by as much as it takes longer than a decode: like
    that it ends with a token. Ties are recomputed, which needs nothing of the network.

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
                contexts[target].append(context_of(self._fleet, pipeline, request_id))
        moved = {request_id for request_id, _ in moves if request_id in self._fleet.produced}
        copies = KvCopies(self._fleet, self._batching, state, moved)
        for target, each in contexts.items():
            home = state.instances[target].nodes[0]
            for stage in pipeline.stages:
                if stage.node != home:
                    copies.add(stage, home, each)
        copied = recomputed = 0.0
        for target, each in contexts.items():
            stages, running = state.instances[target].stages, len(state.instances[target].outstanding)
            copied += len(each) * copies.seconds(stages[0].node)
            recomputed += running * self._recompute_s(state, stages, each, running)
        return "copy" if copied < recomputed else "recompute"

    def at_repartition(self, state: ModelState, instance: Instance, stages: Sequence[Stage]) -> KvPolicy:
        """Choose for an instance that is to move to ``stages``: all its requests wait, whichever way it is."""
        if (fixed := self._fixed()) is not None:
            return fixed
        contexts = [context_of(self._fleet, instance, each) for each in instance.outstanding if each in self._fleet.produced]
        if not contexts:
            return "recompute"
        copies = KvCopies(self._fleet, self._batching, state, set(instance.outstanding))
        for old in instance.stages:
            for new in stages:
                first, last = max(old.first_block, new.first_block), min(old.last_block, new.last_block)
                if first <= last and old.node != new.node:
                    copies.add(Stage(old.node, first, last), new.node, contexts)
        copied = max((copies.seconds(stage.node) for stage in stages), default=0.0)
        recomputed = self._recompute_s(state, stages, contexts, len(instance.outstanding))
        return "copy" if copied < recomputed else "recompute"

    def _fixed(self) -> KvPolicy | None:
        """Return the way that is taken without a prediction, None if one decides."""
        if self._rule != "cheapest":
            return self._rule
        return "recompute" if self._fleet.cluster.kv_path == "messages" else None

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
            share = share_of(state, stage)
            model = ComputeModel(self._fleet.cluster.node(stage.node), state.spec)
            prefill_s[stage.node] += self._iterations_s(model, -(-tokens // batches), attended // batches, share)
            decode_s += model.iteration_s(decode, share)
        return max(0.0, sum(prefill_s.values()) + (nodes - 1) * max(prefill_s.values()) - decode_s)

    def _iterations_s(self, model: ComputeModel, tokens: int, attended: int, share: float) -> float:
        """Seconds for iterations that prefill so many tokens, each as many as one may have."""
        most = self._batching.max_tokens
        sizes = [most] * (tokens // most) + [tokens % most] * (tokens % most > 0)
        return sum(model.iteration_s(Iteration(size, attended * size // tokens), share) for size in sizes)
