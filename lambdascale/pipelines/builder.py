"""Execution pipelines from a multicast plan: complementary destinations that together hold the model early (paper, 4.3).

With k sub-groups whose sources inject shifted, contiguous chunks, one destination of each sub-group make a pipeline. The
block a source injects in round c doubles its holders every round, so all of a sub-group of m nodes (source included) have it
after round c + log2 m if m is a power of two; otherwise after c + floor(log2 m) + 2, the mirroring within a pair being at most
two rounds behind. A pipeline of one node per sub-group is therefore ready after at most ceil(b / k) + ceil(log2 m) + 1 rounds
(+ 0 for a power of two), about 1/k of the b + ceil(log2 m) - 1 rounds of the whole transfer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice, repeat, zip_longest
from typing import Literal

from lambdascale.core import FormRule, MulticastPlan, NodeId, PipelinePlan, PlanError, Stage, SwitchRule
from lambdascale.core.checks import check_types, require
from lambdascale.multicast import arrival_rounds
from lambdascale.pipelines.costs import IN_ROUNDS, Costs

# "cheapest": predicted for each set of nodes, see ComplementaryPipelines.
LeaveRule = Literal["all", "each", "cheapest"]
_Arrivals = Mapping[NodeId, Mapping[int, int]]
_Late = Mapping[NodeId, tuple[int, ...]]  # the round of each block
_Cut = tuple[int, int, int]  # index of a node, first block, last block
_Way = tuple[int, tuple[_Cut, ...]]  # round in which it is ready, stages
_NEVER = 1 << 60


@dataclass(frozen=True, kw_only=True)
class NoPipelines:
    """Load, then execute: builder of systems whose nodes serve only once they hold the whole model."""

    def pipelines(
        self, plan: MulticastPlan, holders: Collection[NodeId] = (), costs: Costs = IN_ROUNDS
    ) -> Sequence[PipelinePlan]:
        """Return no pipelines."""
        return ()


@dataclass(frozen=True, kw_only=True)
class ComplementaryPipelines:
    """Disjoint pipelines of destinations, one node from each sub-group as long as all sub-groups have one.

    The nodes left over (all of them, with one sub-group) are joined into pipelines of up to ``max_stages`` nodes. Of each set of
    nodes, that pipeline is chosen, or those of its halves, which save the waiting requests most time until the mode switch, as
    predicted (see Costs): one contiguous stage a node, as equal as the holdings allow, or several stages in turn, which are ready
    earlier where holdings interleave. A pipeline that would not be ready before one of its nodes holds the whole model is left
    out: that node serves alone by then.

    A pipeline keeps its stages. Dividing it anew after every block, with KV that moves in no time, lowers no P90 TTFT by more
    than 0.3 % and the time per output token by 5 % at most (simulated: bursts of figures 8 and 9, authors' trace).

    ``form``: "always" when the blocks have arrived, or if "useful": where the time until the mode switch allows a first pass;
    such a pipeline gets only as many requests as it can bring to their first tokens by then. ``switch``: a pipeline dissolves
    when "all" its nodes hold the whole model, or "each" leaves when it does, if the others can go on without it: they hold the
    model together and bring the running requests that they keep to a token before the next of them is complete. Otherwise it
    leaves when the complete nodes have places for all running requests. With "cheapest" a pipeline lasts as with "all", but is
    chosen by what it saves against each node's serving alone once that node is complete: one that is complete early is joined to
    late ones only where tokens come so much sooner. "all" and "each" are chosen as if no node could serve alone before the mode
    switch, of the last node or the first.
    """

    max_stages: int = 8
    form: FormRule = "useful"
    switch: LeaveRule = "each"

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.max_stages >= 2, f"pipelines.max_stages must be at least 2, not {self.max_stages}")

    def pipelines(
        self, plan: MulticastPlan, holders: Collection[NodeId] = (), costs: Costs = IN_ROUNDS
    ) -> Sequence[PipelinePlan]:
        """See PipelineBuilder. Holders take no stage: they serve alone (paper, 4.3)."""
        sets = self._sets(plan)
        if not sets:
            return ()
        arrivals = arrival_rounds(plan)
        late, batch = _late(plan, arrivals), costs.batch(len(plan.destinations) or 1)
        found = []
        for nodes in _in_stage_order(sets, plan, arrivals):
            found += self._best(nodes, late, costs, batch)[1]
        return sorted(found, key=lambda p: (p.ready_round, p.nodes))

    def _best(self, nodes: Sequence[NodeId], late: _Late, costs: Costs, batch: int) -> tuple[float, list[PipelinePlan]]:
        """Return the seconds saved and the pipelines: one of all ``nodes``, or the best of each half."""
        if len(nodes) < 2:
            return 0.0, []
        halves = [self._best(nodes[side::2], late, costs, batch) for side in (0, 1)]
        apart = sum(saved for saved, _ in halves), [plan for _, plans in halves for plan in plans]
        joint = self._joint(nodes, late, costs, batch)
        return apart if apart[0] > joint[0] or not joint[1] else joint

    def _joint(self, nodes: Sequence[NodeId], late: _Late, costs: Costs, batch: int) -> tuple[float, list[PipelinePlan]]:
        """Return the seconds saved by the best pipeline of all ``nodes``, and that pipeline, if any is useful."""
        alone_from_s = self._alone_from_s(nodes, late, costs)
        every_s = sorted(alone_from_s.values())
        switch: SwitchRule = "each" if self.switch == "each" else "all"
        best, saved = None, 0.0
        for ready, cuts in _divisions(tuple(late[node] for node in nodes)):
            if best is not None and costs.most_saved_s(every_s, costs.round_s * ready, batch) <= saved:
                break
            stages = tuple([Stage(nodes[index], first, last) for index, first, last in cuts])
            alone = sorted([alone_from_s[node] for node in {stage.node for stage in stages}])
            saves = costs.saved_s(stages, costs.round_s * ready, alone, batch)
            if saves > saved or (best is None and self.form == "always"):
                best, saved = PipelinePlan(ready, stages, self.form, switch), max(saves, 0.0)
        return saved, [] if best is None else [best]

    def _alone_from_s(self, nodes: Sequence[NodeId], late: _Late, costs: Costs) -> dict[NodeId, float]:
        """Return the seconds from which each node would serve alone, without a pipeline: see ``switch``."""
        complete = {node: costs.round_s * max(late[node]) for node in nodes}
        if self.switch == "cheapest":
            return complete
        same = max(complete.values()) if self.switch == "all" else min(complete.values())
        return dict.fromkeys(nodes, same)

    def _sets(self, plan: MulticastPlan) -> list[list[NodeId]]:
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


@dataclass(frozen=True, kw_only=True)
class FixedLengths:
    """Pipelines of as many nodes as the largest of ``lengths`` that are left, then the next (the prototype: 8, 4, 2, 1).

    Destinations are taken evenly from the sub-groups; what is left serves alone. A pipeline has those stages that are ready
    first, one contiguous stage a node or several in turn. Nothing is predicted: it serves as soon as its blocks are in place,
    until all its nodes hold the model (reference, section 2.4). A stage is made of execution blocks, each of
    ``unit`` adjacent blocks, and can run one when its last block has come (the prototype: two transfer blocks; section 2.1).
    """

    lengths: tuple[int, ...] = (8, 4, 2)
    unit: int = 1

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(
            len(self.lengths) > 0 and min(self.lengths) >= 2,
            f"pipelines.lengths takes lengths of at least 2, not {list(self.lengths)}",
        )
        require(self.unit >= 1, f"pipelines.unit must be at least 1, not {self.unit}")

    def pipelines(
        self, plan: MulticastPlan, holders: Collection[NodeId] = (), costs: Costs = IN_ROUNDS
    ) -> Sequence[PipelinePlan]:
        """See PipelineBuilder. Holders take no stage."""
        arrivals = arrival_rounds(plan)
        late, found = _late(plan, arrivals), []
        for nodes in _in_stage_order(self._sets(plan), plan, arrivals):
            ways = _divisions(tuple(self._executable(late[node]) for node in nodes))
            for ready, cuts in islice(ways, 1):
                stages = tuple(Stage(nodes[index], *self._blocks(first, last, plan.blocks)) for index, first, last in cuts)
                found.append(PipelinePlan(ready, stages, "always", "all"))
        return sorted(found, key=lambda p: (p.ready_round, p.nodes))

    def _sets(self, plan: MulticastPlan) -> Iterator[list[NodeId]]:
        rows = zip_longest(*(group[1:] for group in plan.groups))
        left = [node for row in rows for node in row if node is not None]
        for length in sorted(self.lengths, reverse=True):
            while len(left) >= length <= -(-plan.blocks // self.unit):
                yield left[:length]
                del left[:length]

    def _executable(self, rounds: tuple[int, ...]) -> tuple[int, ...]:
        """Return the round of each execution block, given those of the blocks."""
        return tuple(max(rounds[first : first + self.unit]) for first in range(0, len(rounds), self.unit))

    def _blocks(self, first: int, last: int, blocks: int) -> tuple[int, int]:
        """Return the first and last block of a range of execution blocks."""
        return first * self.unit, min((last + 1) * self.unit, blocks) - 1


class _Divisions:
    """Ways in which nodes, in this order, can divide the model before one of them holds all of it, by their rounds.

    ``late``: by node, the round of each block. A way is its round and the (index of the node, first block, last block) of its
    stages: stages in turn for every round that allows it, until each node can have one contiguous stage. Ways are worked out as
    they are asked for, mostly only the first, and kept: scale-outs of the same shape follow each other.
    """

    def __init__(self, late: tuple[tuple[int, ...], ...]) -> None:
        self._found: list[_Way] = []
        self._rest = _ways(late)

    def __iter__(self) -> Iterator[_Way]:
        """Yield the ways, those that are ready first before others."""
        position = 0
        while True:
            if position == len(self._found):
                way = next(self._rest, None)
                if way is None:
                    return
                self._found.append(way)
            yield self._found[position]
            position += 1


_divisions = lru_cache(maxsize=1024)(_Divisions)


def _ways(late: Sequence[Sequence[int]]) -> Iterator[_Way]:
    """Yield the ways of _Divisions: see there."""
    blocks = len(late[0])
    alone, ready = min(map(max, late)), max(map(min, *late)) if len(late) > 1 else max(late[0])
    while ready < alone:
        held = [_held(rounds, ready) for rounds in late]
        if _allows_ranges(held, blocks):
            cuts = _balanced_cuts(late, blocks, ready)
            yield ready, tuple((index, cuts[index], cuts[index + 1] - 1) for index in range(len(late)))
            return
        yield ready, tuple(_taking_turns(held, blocks))
        ready = min((arrival for rounds in late for arrival in rounds if arrival > ready), default=alone)


def _held(rounds: Sequence[int], ready: int) -> int:
    """Return a bit for each block that has arrived after round ``ready``."""
    return sum([1 << block for block, arrival in enumerate(rounds) if arrival <= ready])


def divide(held: Mapping[NodeId, Collection[int]], blocks: int) -> tuple[Stage, ...] | None:
    """Return stages of the blocks that nodes hold now, one a node if possible; None if they do not cover the model."""
    nodes = sorted(held, key=lambda node: (sum(held[node]) / max(1, len(held[node])), node))
    ways = _divisions(tuple(tuple(0 if block in held[node] else 1 for block in range(blocks)) for node in nodes))
    return next((tuple(Stage(nodes[index], *cut) for index, *cut in cuts) for ready, cuts in ways if ready == 0), None)


def _taking_turns(held: Sequence[int], blocks: int) -> Iterator[_Cut]:
    """Yield stages that cover the model with the blocks that the nodes hold, a bit for each block.

    Each node takes an even share of the blocks as long as others hold the next one; the longest run goes first.
    """
    left = [-(-blocks // len(held))] * len(held)
    begin = 0
    while begin < blocks:
        runs = [_run(bits >> begin) for bits in held]
        within = [min(run, quota) for run, quota in zip(runs, left, strict=True)]
        taken = within if any(within) else runs
        taker = max(range(len(held)), key=lambda i: (taken[i], left[i], -i))
        yield taker, begin, begin + taken[taker] - 1
        left[taker] -= min(taken[taker], left[taker])
        begin += taken[taker]


def _run(bits: int) -> int:
    """Return the number of ones at the lower end of ``bits``."""
    return (bits ^ (bits + 1)).bit_length() - 1


def _late(plan: MulticastPlan, arrivals: _Arrivals) -> _Late:
    blocks = range(plan.blocks)
    return {node: tuple(map(arrivals[node].get, blocks, repeat(_NEVER))) for node in plan.destinations}


def _in_stage_order(sets: Iterable[Sequence[NodeId]], plan: MulticastPlan, arrivals: _Arrivals) -> Iterator[list[NodeId]]:
    """Sort each set by the block a node's sub-group starts with, then by the mean position of the blocks that arrive first."""
    starts = {node: order[0] for group, order in zip(plan.groups, plan.orders, strict=True) for node in group[1:]}

    def key(node: NodeId, parts: int) -> tuple[int, float, NodeId]:
        came = arrivals[node]
        blocks = [block for _, block in sorted(zip(came.values(), came, strict=True))]
        early = blocks[: -(-len(blocks) // parts)]
        return starts[node], sum(early) / max(1, len(early)), node

    for nodes in sets:
        yield sorted(nodes, key=partial(key, parts=len(nodes)))


def _allows_ranges(held: Sequence[int], blocks: int) -> bool:
    """True if nodes that hold these blocks, a bit for each, can serve one contiguous, non-empty range each, in this order.

    ``reached``: a bit for each boundary at which the stages so far can end. A boundary is within a node's reach if it holds the
    blocks from an earlier boundary on: the carry of an addition runs through them.
    """
    reached = 1
    for bits in held:
        begins = reached & bits
        reached = (((begins + bits) ^ bits | begins) & bits) << 1
    return bool(reached >> blocks & 1)


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
