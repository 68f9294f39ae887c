"""Pipelines against brute force: as early as their order allows, as even as the holdings allow, over all nodes that help."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest

from lambdascale.core import MulticastPlan, PipelinePlan, PlanError, Send, Stage, UserError
from lambdascale.multicast import BinomialPipeline, arrival_rounds, completion_rounds
from lambdascale.pipelines import ComplementaryPipelines, FixedLengths, NoPipelines, spread_requests, validate_pipeline

CASES = [(s, d, b) for s in (1, 2, 3, 4) for d in (2, 3, 4, 5, 7, 8, 11) for b in (2, 3, 4, 7, 8)]


def planned(sources: int, destinations: int, blocks: int, **builder: int) -> tuple[MulticastPlan, Sequence[PipelinePlan]]:
    plan = BinomialPipeline().plan(sources=sources, destinations=destinations, blocks=blocks)
    return plan, ComplementaryPipelines(**builder).pipelines(plan)


def shown(pipelines: Sequence[PipelinePlan]) -> list[str]:
    """Ready round and stages, like 4 5:0-3 8:4-7."""
    return [f"{p.ready_round} " + " ".join(f"{s.node}:{s.first_block}-{s.last_block}" for s in p.stages) for p in pipelines]


def best_cuts(plan: MulticastPlan, nodes: Sequence[int]) -> tuple[int, int] | None:
    """(earliest ready round, then smallest longest stage) of one non-empty stage per node in this order; None if impossible."""
    arrivals = arrival_rounds(plan)
    found = []
    for inner in combinations(range(1, plan.blocks), len(nodes) - 1):
        cuts = [0, *inner, plan.blocks]
        stages = [range(cuts[i], cuts[i + 1]) for i in range(len(nodes))]
        ready = max(arrivals[node][block] for node, blocks in zip(nodes, stages, strict=True) for block in blocks)
        found.append((ready, max(map(len, stages))))
    return min(found) if found else None


@pytest.mark.parametrize(("sources", "destinations", "blocks"), CASES)
def test_pipelines_are_as_early_and_as_even_as_their_nodes_allow(sources: int, destinations: int, blocks: int) -> None:
    plan, pipelines = planned(sources, destinations, blocks)
    arrivals, complete = arrival_rounds(plan), completion_rounds(plan)
    for pipeline in pipelines:
        validate_pipeline(plan, pipeline)
        alone = min(complete[node] for node in pipeline.nodes)
        assert pipeline.ready_round < alone, "a node that is complete serves alone"
        if len(pipeline.stages) == len(pipeline.nodes) == len(set(pipeline.nodes)):
            longest = max(s.last_block - s.first_block + 1 for s in pipeline.stages)
            best = best_cuts(plan, pipeline.nodes)
            assert best is None or (pipeline.ready_round, longest) == best or pipeline.ready_round < best[0]
        earliest = max(min(arrivals[node][block] for node in pipeline.nodes) for block in range(blocks))
        assert pipeline.ready_round >= earliest


@pytest.mark.parametrize("blocks", [8, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("sources", [2, 3, 4])
def test_with_equal_sub_groups_every_destination_serves_in_a_pipeline(sources: int, rows: int, blocks: int) -> None:
    """Mutation: pipelines over fewer nodes than possible."""
    plan, pipelines = planned(sources, sources * rows, blocks)
    assert sorted(node for pipeline in pipelines for node in pipeline.nodes) == list(plan.destinations)
    groups = {node: index for index, group in enumerate(plan.groups) for node in group[1:]}
    for pipeline in pipelines:
        assert sorted(groups[node] for node in pipeline.nodes) == list(range(sources)), "one node of each sub-group"


@pytest.mark.parametrize(("max_stages", "sizes"), [(8, [6]), (6, [6]), (5, [3, 3]), (4, [3, 3]), (3, [3, 3]), (2, [2, 2, 2])])
def test_no_pipeline_is_longer_than_configured_and_parts_are_even(max_stages: int, sizes: list[int]) -> None:
    _, pipelines = planned(6, 6, 12, max_stages=max_stages)
    assert [len(pipeline.nodes) for pipeline in pipelines] == sizes


def test_no_pipeline_has_more_stages_than_the_model_has_blocks() -> None:
    _, pipelines = planned(6, 6, 3)
    assert [len(pipeline.nodes) for pipeline in pipelines] == [3, 3]
    assert shown(planned(4, 4, 1)[1]) == [], "a block is in time for a node to serve alone"


@pytest.mark.parametrize(
    ("sources", "destinations", "blocks", "expected"),
    [
        (2, 2, 4, ["2 2:0-1 3:2-3"]),
        (2, 4, 4, ["2 2:0-1 4:2-3", "3 3:0-1 5:2-3"]),
        (3, 3, 7, ["3 3:0-1 4:2-4 5:5-6"]),
        (2, 5, 8, ["5 3:0-3 5:4-7", "6 2:0-3 4:4-7"]),
        (3, 8, 8, ["4 3:0-2 5:3-4 8:5-7", "5 4:0-2 6:3-4 9:5-7", "6 10:0-1 7:2-5 10:6-7"]),
        (1, 2, 4, []),
        (1, 3, 4, ["4 2:0-1 3:2-2 2:3-3"]),
        (1, 5, 6, ["6 3:0-0 4:1-1 5:2-3 1:4-4 2:5-5"]),
        (1, 7, 8, ["8 2:0-1 3:2-3 6:4-5 1:6-6 2:7-7"]),
    ],
)
def test_pipelines_worked_out_by_hand(sources: int, destinations: int, blocks: int, expected: list[str]) -> None:
    assert shown(planned(sources, destinations, blocks)[1]) == expected


def by_arrivals(*orders: Sequence[int]) -> MulticastPlan:
    """Node i of 1.. receives the blocks of its order one a round, from a source of its own (0 stands in for all)."""
    nodes = range(1, len(orders) + 1)
    rounds = tuple(
        tuple(Send(0, node, order[r]) for node, order in zip(nodes, orders, strict=True)) for r in range(len(orders[0]))
    )
    return MulticastPlan(
        members=(0, *nodes),
        sources=(0,),
        blocks=len(orders[0]),
        rounds=rounds,
        groups=tuple((0, node) for node in nodes),
        orders=tuple(tuple(order) for order in orders),
    )


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        # Even cuts where the holdings allow several.
        (((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0)), ["3 1:0-2 2:3-5"]),
        (((0, 1, 2, 3, 4, 5), (3, 4, 5, 0, 1, 2)), ["3 1:0-2 2:3-5"]),
        (((3, 4, 5, 0, 1, 2), (0, 1, 2, 3, 4, 5)), ["3 2:0-2 1:3-5"]),
        (((0, 1, 2, 3, 4, 5), (4, 5, 3, 2, 1, 0)), ["3 1:0-2 2:3-5"]),
        # Stages in turn are ready a round before one stage each: 0 to 1 and 2 to 5.
        (((0, 1, 5, 4, 3, 2), (2, 3, 4, 5, 0, 1)), ["3 1:0-1 2:2-4 1:5-5"]),
        # Interleaved holdings: nodes take several stages in turn, the longest run first, each an even share.
        (((0, 4, 1, 2, 3), (2, 1, 3, 0, 4)), ["3 1:0-1 2:2-3 1:4-4"]),
        # One stage each would be ready two rounds later: 0 and 1 to 5.
        (((0, 2, 4, 5, 3, 1), (1, 3, 5, 4, 2, 0)), ["3 1:0-0 2:1-1 1:2-2 2:3-3 1:4-4 2:5-5"]),
        (((0, 1, 2, 5, 3, 4), (3, 4, 5, 0, 1, 2), (2, 3, 0, 1, 4, 5)), ["3 1:0-1 3:2-3 2:4-5"]),
        # Never before one of the nodes serves alone.
        (((0, 1), (0, 1)), []),
        (((0, 1, 2), (0, 1, 2)), []),
    ],
)
def test_stages_for_given_arrivals(orders: tuple[tuple[int, ...], ...], expected: list[str]) -> None:
    assert shown(ComplementaryPipelines().pipelines(by_arrivals(*orders))) == expected


def test_a_plan_that_does_not_bring_everything_can_be_read() -> None:
    """Nodes that miss a block for good form a pipeline with those that have it."""
    plan = MulticastPlan(
        members=(0, 1, 2),
        sources=(0,),
        blocks=2,
        rounds=((Send(0, 1, 0), Send(0, 2, 1)),),
        groups=((0, 1), (0, 2)),
        orders=((0, 1), (1, 0)),
    )
    assert shown(ComplementaryPipelines().pipelines(plan)) == ["1 1:0-0 2:1-1"]


@pytest.mark.parametrize(
    ("sources", "destinations", "sets"),
    [
        (1, 1, []),
        (1, 3, [{1, 2}]),
        (2, 4, [{2, 3, 4, 5}]),
        (2, 7, [{2, 3, 5, 6}, {4, 7}]),
        (4, 15, [{4, 5, 7, 8, 11, 12, 15, 16}, {6, 9, 13, 17}, {10, 14}]),
        (1, 16, [set(range(1, 9)), set(range(9, 17))]),
    ],
)
def test_pipelines_of_fixed_lengths_take_nodes_evenly_from_the_sub_groups(
    sources: int, destinations: int, sets: list[set[int]]
) -> None:
    """Reference, 2.4: 8, 4, 2, 1. Mutations: the nodes of a sub-group taken together; the smaller length first."""
    plan = BinomialPipeline(chunks="round_robin").plan(sources=sources, destinations=destinations, blocks=16)
    pipelines = FixedLengths().pipelines(plan)
    assert sorted(map(sorted, (set(p.nodes) for p in pipelines))) == sorted(map(sorted, sets))
    for pipeline in pipelines:
        validate_pipeline(plan, pipeline)
        assert (pipeline.form, pipeline.switch) == ("always", "all")


def test_a_pipeline_of_fixed_length_has_the_stages_that_are_ready_first() -> None:
    """Contiguous stages would be ready later (see ComplementaryPipelines, which weighs both)."""
    plan = BinomialPipeline(chunks="round_robin").plan(sources=2, destinations=2, blocks=4)
    assert shown(FixedLengths().pipelines(plan)) == ["2 2:0-0 3:1-1 2:2-2 3:3-3"]
    assert shown(FixedLengths(lengths=(3,)).pipelines(plan)) == []


def test_pipelines_are_no_longer_than_the_model_has_blocks() -> None:
    plan = BinomialPipeline().plan(sources=2, destinations=8, blocks=4)
    assert len(FixedLengths().pipelines(plan)) == 2, "of four nodes each, not one of eight"


def test_load_then_execute_has_no_pipelines() -> None:
    assert NoPipelines().pipelines(planned(2, 2, 4)[0]) == ()


def test_settings_are_checked() -> None:
    assert ComplementaryPipelines(max_stages=2).max_stages == 2
    with pytest.raises(UserError, match=r"pipelines\.max_stages must be at least 2, not 1"):
        ComplementaryPipelines(max_stages=1)
    with pytest.raises(UserError, match="max_stages must be int"):
        ComplementaryPipelines(max_stages=2.5)
    for lengths in ((), (4, 1)):
        with pytest.raises(UserError, match=r"pipelines\.lengths takes lengths of at least 2, not"):
            FixedLengths(lengths=lengths)


@pytest.mark.parametrize(
    ("stages", "ready", "message"),
    [
        ([(2, 0, 1), (3, 2, 3)], 1, "node 2 does not hold block 1 after round 1"),
        ([(2, 0, 1), (3, 3, 3)], 2, "stage on node 3 begins at block 3, expected 2"),
        ([(2, 1, 1), (3, 2, 3)], 2, "stage on node 2 begins at block 1, expected 0"),
        ([(2, 0, -1), (3, 0, 3)], 4, "stage on node 2 begins at block 0, expected 0"),
        ([(2, 0, 1), (3, 2, 2)], 2, "the pipeline ends before block 3 of 4"),
        ([(0, 0, 3)], 9, "node 0 does not hold block 0 after round 9"),
    ],
)
def test_the_validator_names_what_is_wrong(stages: list[tuple[int, int, int]], ready: int, message: str) -> None:
    plan, _ = planned(2, 2, 4)
    with pytest.raises(PlanError, match=message):
        validate_pipeline(plan, PipelinePlan(ready, tuple(Stage(*stage) for stage in stages)))


@pytest.mark.parametrize(
    ("requests", "loads", "expected"),
    [
        ([1, 2, 3], {}, ((1, 7), (2, 8), (3, 7))),
        ([1, 2, 3], {7: 2}, ((1, 8), (2, 8), (3, 7))),
        ([1, 2, 3], {7: 1, 8: 1}, ((1, 7), (2, 8), (3, 7))),
        ([1], {8: 0, 7: 1}, ((1, 8),)),
        ([], {}, ()),
    ],
)
def test_requests_go_to_the_least_loaded_instance_the_first_in_a_tie(
    requests: list[int], loads: dict[int, int], expected: tuple[tuple[int, int], ...]
) -> None:
    assert spread_requests(requests, [7, 8], loads) == expected


def test_holders_hold_every_block_from_the_start() -> None:
    plan, _ = planned(2, 2, 4)
    validate_pipeline(plan, PipelinePlan(2, (Stage(2, 0, 1), Stage(0, 2, 3))), holders=[0])
