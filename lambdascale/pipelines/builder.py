"""Execution pipelines from a multicast plan: complementary destinations that together hold the model early (paper, 4.3).

With k sub-groups whose sources inject shifted, contiguous chunks, one destination of each sub-group make a pipeline. The
block a source injects in round c doubles its holders every round, so all of a sub-group of m nodes (source included) have it
after round c + log2 m if m is a power of two; otherwise after c + floor(log2 m) + 2, the mirroring within a pair being at most
two rounds behind. A pipeline of one node per sub-group is therefore ready after at most ceil(b / k) + ceil(log2 m) + 1 rounds
(+ 0 for a power of two), about 1/k of the b + ceil(log2 m) - 1 rounds of the whole transfer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lambdascale.core import MulticastPlan, NodeId, PipelinePlan, PlanError, Stage
from lambdascale.core.checks import check_types, require
from lambdascale.multicast import arrival_rounds

_Arrivals = Mapping[NodeId, Mapping[int, int]]
_NEVER = 1 << 60


@dataclass(frozen=True, kw_only=True)
class NoPipelines:
    """Load, then execute: builder of systems whose nodes serve only once they hold the whole model."""

    def pipelines(self, plan: MulticastPlan, holders: Collection[NodeId] = ()) -> Sequence[PipelinePlan]:
        """Return no pipelines."""
        return ()


@dataclass(frozen=True, kw_only=True)
class ComplementaryPipelines:
    """Disjoint pipelines of destinations, one node from each sub-group as long as all sub-groups have one.

    The nodes left over (all of them, with one sub-group) are joined into pipelines of up to ``max_stages`` nodes if that helps.
    A node has one contiguous stage, and stages are as equal as the holdings at the ready round allow. Where holdings interleave
    too much for that (one sub-group), nodes take several stages in turn. A pipeline that would not be ready before one of its
    nodes holds the whole model is left out: that node serves alone by then.
    """

    max_stages: int = 8

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.max_stages >= 2, f"pipelines.max_stages must be at least 2, not {self.max_stages}")

    def pipelines(self, plan: MulticastPlan, holders: Collection[NodeId] = ()) -> Sequence[PipelinePlan]:
        """See PipelineBuilder. Holders take no stage: they serve alone (paper, 4.3)."""
        arrivals = arrival_rounds(plan)
        starts = {node: order[0] for group, order in zip(plan.groups, plan.orders, strict=True) for node in group[1:]}
        found = (_pipeline(_in_stage_order(nodes, starts, arrivals), arrivals, plan.blocks) for nodes in self._candidates(plan))
        return sorted((p for p in found if p is not None), key=lambda p: (p.ready_round, p.nodes))

    def _candidates(self, plan: MulticastPlan) -> list[list[NodeId]]:
        """Disjoint sets of destinations, taken evenly from the sub-groups."""
        queues = [list(group[1:]) for group in plan.groups]
        sets = []
        if len(queues) > 1:
            for _ in range(min(len(queue) for queue in queues)):
                sets += self._parts([queue.pop(0) for queue in queues], plan.blocks)
        rest = [node for queue in queues for node in queue]
        return sets + self._parts(rest, plan.blocks)

    def _parts(self, nodes: list[NodeId], blocks: int) -> list[list[NodeId]]:
        limit = min(self.max_stages, blocks)
        count = -(-len(nodes) // limit)
        return [part for part in (nodes[i::count] for i in range(count)) if len(part) > 1]


def _pipeline(ordered: Sequence[NodeId], arrivals: _Arrivals, blocks: int) -> PipelinePlan | None:
    """Return the earliest pipeline of these nodes in this order; None if one of them is complete before it is ready."""
    late = [[arrivals[node].get(block, _NEVER) for block in range(blocks)] for node in ordered]
    alone = min(max(rounds) for rounds in late)
    ready = _earliest(late, blocks)
    if ready < alone:
        cuts = _balanced_cuts(late, blocks, ready)
        return PipelinePlan(ready, tuple(Stage(node, cuts[i], cuts[i + 1] - 1) for i, node in enumerate(ordered)))
    ready = max(min(rounds[block] for rounds in late) for block in range(blocks))
    if ready < alone:
        return PipelinePlan(ready, tuple(_taking_turns(ordered, late, blocks, ready)))
    return None


def _taking_turns(nodes: Sequence[NodeId], late: Sequence[Sequence[int]], blocks: int, ready: int) -> Iterator[Stage]:
    """Yield stages that cover the model with the blocks the nodes hold after round ``ready``.

    Each node takes an even share of the blocks as long as others hold the next one; the longest run goes first.
    """
    left = [-(-blocks // len(nodes))] * len(nodes)
    begin = 0
    while begin < blocks:
        runs = [next((b for b in range(begin, blocks) if rounds[b] > ready), blocks) - begin for rounds in late]
        within = [min(run, quota) for run, quota in zip(runs, left, strict=True)]
        taken = within if any(within) else runs
        taker = max(range(len(nodes)), key=lambda i: (taken[i], left[i], -i))
        yield Stage(nodes[taker], begin, begin + taken[taker] - 1)
        left[taker] -= min(taken[taker], left[taker])
        begin += taken[taker]


def _in_stage_order(nodes: Sequence[NodeId], starts: Mapping[NodeId, int], arrivals: _Arrivals) -> list[NodeId]:
    """Sort nodes by the block their sub-group starts with, then by the mean position of the blocks that arrive first."""

    def key(node: NodeId) -> tuple[int, float, NodeId]:
        blocks = sorted(arrivals[node], key=lambda block: (arrivals[node][block], block))
        early = blocks[: -(-len(blocks) // len(nodes))]
        return starts[node], sum(early) / max(1, len(early)), node

    return sorted(nodes, key=key)


def _earliest(late: Sequence[Sequence[int]], blocks: int) -> int:
    """Return the first round after which the nodes, in this order, can serve one contiguous, non-empty range each."""
    rounds = sorted({r for of_node in late for r in of_node})
    low, high = 0, len(rounds) - 1
    while low < high:
        middle = (low + high) // 2
        if _cuts(late, blocks, rounds[middle], blocks) is not None:
            high = middle
        else:
            low = middle + 1
    return rounds[low]


def _balanced_cuts(late: Sequence[Sequence[int]], blocks: int, ready: int) -> list[int]:
    """Return stage boundaries for round ``ready`` that make the longest stage as short as possible."""
    longest = -(-blocks // len(late))
    while (cuts := _cuts(late, blocks, ready, longest)) is None:
        longest += 1
    return cuts


def _cuts(late: Sequence[Sequence[int]], blocks: int, ready: int, longest: int) -> list[int] | None:
    """Return boundaries of stages of at most ``longest`` blocks held after round ``ready``; None if impossible.

    Dynamic programme over stages: the boundaries within reach, each with the one before it (the one nearest to an even cut).
    """
    stages = len(late)
    reached: list[dict[int, int]] = [{0: 0}]
    for index, rounds in enumerate(late):
        even = blocks * (index + 1) / stages
        ends: dict[int, int] = {}
        for begin in sorted(reached[-1], key=lambda cut: abs(cut - blocks * index / stages)):
            end = begin
            while end < blocks and end - begin < longest and rounds[end] <= ready:
                end += 1
                ends.setdefault(end, begin)
        if not ends:
            return None
        reached.append(dict(sorted(ends.items(), key=lambda item: abs(item[0] - even))))
    if blocks not in reached[-1]:
        return None
    cuts = [blocks]
    for ends in reversed(reached[1:]):
        cuts.append(ends[cuts[-1]])
    return cuts[::-1]


def validate_pipeline(plan: MulticastPlan, pipeline: PipelinePlan, holders: Collection[NodeId] = ()) -> None:
    """Raise PlanError unless the stages cover the model once, in order, and are held after ``ready_round`` rounds.

    ``holders`` hold every block from the start.
    """
    arrivals = arrival_rounds(plan)
    expected = 0
    for stage in pipeline.stages:
        if stage.first_block != expected or stage.last_block < stage.first_block:
            raise PlanError(f"stage on node {stage.node} begins at block {stage.first_block}, expected {expected}")
        expected = stage.last_block + 1
        for block in range(stage.first_block, expected):
            if stage.node in holders:
                continue
            if arrivals.get(stage.node, {}).get(block, _NEVER) > pipeline.ready_round:
                raise PlanError(f"node {stage.node} does not hold block {block} after round {pipeline.ready_round}")
    if expected != plan.blocks:
        raise PlanError(f"the pipeline ends before block {expected} of {plan.blocks}")
