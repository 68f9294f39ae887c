"""Exact bounds of λScale's multicast, and bounds of the pipelines built from it."""

from __future__ import annotations

from math import ceil, log2

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lambdascale.core import MulticastPlan, PlanError, Send
from lambdascale.multicast import (
    BinomialPipeline,
    arrival_rounds,
    completion_rounds,
    injection_orders,
    near_equal_groups,
    plan_from_holdings,
    validate_plan,
)
from lambdascale.pipelines import ComplementaryPipelines, spread_requests, validate_pipeline


def fill(nodes: int) -> int:
    """The proven delay from a block's injection to the last node: log2 n, or two rounds of mirroring behind the hypercube."""
    return ceil(log2(nodes)) + (0 if nodes & (nodes - 1) == 0 else 1)


def check_single_group(nodes: int, blocks: int) -> None:
    plan = BinomialPipeline().plan(sources=1, destinations=nodes - 1, blocks=blocks)
    validate_plan(plan)
    assert len(plan.rounds) == blocks + ceil(log2(nodes)) - 1
    assert sum(map(len, plan.rounds)) == (nodes - 1) * blocks
    assert plan.double_receives == (), "the mirroring never needs a second receive, as the validator has checked"


@pytest.mark.parametrize("nodes", range(2, 129, 3))
def test_lower_bound_is_met_for_every_number_of_nodes(nodes: int) -> None:
    for blocks in (1, 2, 5, 16, 64):
        check_single_group(nodes, blocks)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", range(2, 129))
def test_lower_bound_is_met_everywhere(nodes: int) -> None:
    for blocks in range(1, 65):
        check_single_group(nodes, blocks)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 40))
def test_every_block_is_everywhere_a_logarithm_after_its_injection(nodes: int, blocks: int) -> None:
    plan = BinomialPipeline().plan(sources=1, destinations=nodes - 1, blocks=blocks)
    for arrivals in arrival_rounds(plan).values():
        for position, block in enumerate(plan.orders[0], start=1):
            assert arrivals[block] <= position + fill(nodes)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40))
def test_k_way_rounds_and_first_pipeline(sources: int, destinations: int, blocks: int) -> None:
    plan = BinomialPipeline().plan(sources=sources, destinations=destinations, blocks=blocks)
    largest, groups = max(map(len, plan.groups)), len(plan.groups)
    assert len(plan.rounds) == blocks + ceil(log2(largest)) - 1
    pipelines = ComplementaryPipelines(max_stages=8).pipelines(plan)
    used = [node for pipeline in pipelines for node in pipeline.nodes]
    assert len(set(used)) == len(used), "disjoint"
    assert set(used) <= set(plan.destinations)
    complete = completion_rounds(plan)
    for pipeline in pipelines:
        validate_pipeline(plan, pipeline)
        assert pipeline.ready_round < min(complete[node] for node in pipeline.nodes)
        assert len(pipeline.nodes) <= 8
    bound = ceil(blocks / groups) + max(fill(len(group)) for group in plan.groups)
    assume(groups > 1 and blocks >= groups and bound < min(complete.values()))
    assert pipelines[0].ready_round <= bound
    # One node of each sub-group: as many early pipelines as the smallest sub-group has destinations.
    early = [pipeline for pipeline in pipelines if pipeline.ready_round <= bound]
    assert len(early) >= min(map(len, plan.groups)) - 1


def test_four_sources_serve_at_a_quarter_of_the_transfer() -> None:
    plan = BinomialPipeline().plan(sources=4, destinations=8, blocks=16)
    first, second = ComplementaryPipelines().pipelines(plan)
    assert (first.ready_round, second.ready_round, len(plan.rounds)) == (4, 5, 17)
    assert [(s.first_block, s.last_block) for s in first.stages] == [(0, 3), (4, 7), (8, 11), (12, 15)]


@pytest.mark.parametrize("blocks", [7, 16, 40])
@pytest.mark.parametrize("nodes", [4, 8])
def test_one_source_serves_as_soon_as_it_has_sent_everything_once(nodes: int, blocks: int) -> None:
    plan = BinomialPipeline().plan(sources=1, destinations=nodes - 1, blocks=blocks)
    pipeline = ComplementaryPipelines().pipelines(plan)[0]
    assert pipeline.ready_round == blocks
    loads = [sum(s.last_block - s.first_block + 1 for s in pipeline.stages if s.node == node) for node in pipeline.nodes]
    assert sum(loads) == blocks
    assert max(loads) <= ceil(blocks / 2), "no node does most of the work"


def test_three_nodes_are_a_pair_behind_the_source() -> None:
    plan = BinomialPipeline().plan(sources=1, destinations=2, blocks=3)
    assert [len(sends) for sends in plan.rounds] == [1, 2, 2, 1]


@given(st.integers(1, 12), st.integers(0, 60))
def test_groups_are_near_equal(sources: int, destinations: int) -> None:
    sizes = [len(group) - 1 for group in near_equal_groups(sources, destinations)]
    assert sum(sizes) == destinations
    assert max(sizes) - min(sizes) <= 1
    assert destinations == 0 or min(sizes) >= 1


@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from(["shift", "half", "none"]),
    st.sampled_from(["contiguous", "round_robin"]),
)
def test_every_injection_order_is_a_permutation(blocks: int, groups: int, order: str, chunks: str) -> None:
    for injected in injection_orders(blocks, groups, order, chunks):
        assert sorted(injected) == list(range(blocks))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 12).flatmap(
        lambda blocks: st.tuples(
            st.just(blocks), st.lists(st.sets(st.integers(0, blocks - 1)), min_size=1, max_size=7), st.integers(0, 3)
        )
    )
)
def test_survivors_complete_each_other_or_a_block_is_lost(case: tuple[int, list[set[int]], int]) -> None:
    blocks, partial, full = case
    holdings = {10 + i: held for i, held in enumerate(partial)} | {50 + i: set(range(blocks)) for i in range(full)}
    destinations = [10 + i for i in range(len(partial))]
    if not full and set().union(*partial) != set(range(blocks)):
        with pytest.raises(PlanError, match="no survivor holds block"):
            plan_from_holdings(holdings, destinations, blocks)
        return
    plan = plan_from_holdings(holdings, destinations, blocks)
    validate_plan(plan, holdings=holdings)
    assert plan.double_receives == ()
    assert sum(map(len, plan.rounds)) == sum(blocks - len(held) for held in partial)


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        (((Send(1, 2, 0),),), "round 1: node 1 sends block 0, which it does not hold yet"),
        (((Send(0, 1, 0), Send(1, 2, 0)),), "round 1: node 1 sends block 0, which it does not hold yet"),
        (((Send(0, 1, 0),), (Send(0, 1, 0),)), "round 2: node 1 gets block 0 again"),
        (((Send(0, 1, 0), Send(0, 2, 0)),), "round 1: node 0 sends 2 blocks at once"),
        (((Send(0, 1, 7),),), "round 1: block 7 does not exist: the model has 2"),
        (((Send(0, 9, 0),),), "round 1: a send from 0 to 9 is not between two members"),
        (((Send(0, 1, 0),), (Send(0, 1, 1),)), "node 2 never gets block 0"),
        (
            ((Send(0, 1, 0),), (Send(0, 2, 1), Send(1, 2, 0)), (Send(0, 1, 1),)),
            "round 2: node 2 receives 2 blocks at once, the plan declares 1",
        ),
    ],
)
def test_the_validator_names_what_is_wrong(rounds: tuple[tuple[Send, ...], ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        validate_plan(MulticastPlan(members=(0, 1, 2), sources=(0,), blocks=2, rounds=rounds))


DOUBLING = MulticastPlan(
    members=(0, 1, 2),
    sources=(0,),
    blocks=2,
    rounds=((Send(0, 1, 0),), (Send(0, 2, 1), Send(1, 2, 0)), (Send(0, 1, 1),)),
    double_receives=((2, 2),),
)


def test_a_declared_double_receive_is_valid_on_any_nodes() -> None:
    validate_plan(DOUBLING)
    moved = DOUBLING.on([7, 9, 5])
    assert moved.double_receives == ((2, 5),)
    validate_plan(moved)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ((), "round 2: node 2 receives 2 blocks at once, the plan declares 1"),
        (((1, 2), (2, 2)), "round 1: node 2 receives 0 blocks at once, the plan declares 2"),
        (((2, 2), (3, 1)), "round 3: node 1 receives 1 blocks at once, the plan declares 2"),
        (((2, 2), (4, 2)), "round 4: the double receive of node 2 is declared outside the plan"),
        (((0, 2), (2, 2)), "round 0: the double receive of node 2 is declared outside the plan"),
        (((2, 2), (2, 9)), "round 2: the double receive of node 9 is declared outside the plan"),
        (((2, 2), (2, 2)), "a double receive is declared twice"),
    ],
)
def test_double_receives_happen_exactly_where_they_are_declared(declared: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        validate_plan(replace(DOUBLING, double_receives=declared))


def test_three_blocks_at_once_are_never_valid() -> None:
    rounds = ((Send(0, 3, 0), Send(1, 3, 1), Send(2, 3, 2)),)
    plan = MulticastPlan(members=(0, 1, 2, 3), sources=(0, 1, 2), blocks=3, rounds=rounds, double_receives=((1, 3),))
    with pytest.raises(PlanError, match="node 3 receives 3 blocks at once, the plan declares 2"):
        validate_plan(plan)


@pytest.mark.parametrize(
    ("members", "sources", "blocks", "message"),
    [
        ((0, 1), (0,), 0, "a plan needs at least one block, not 0"),
        ((0, 1, 1), (0,), 1, "members must be distinct and begin with the sources"),
        ((1, 0), (0,), 1, "members must be distinct and begin with the sources"),
    ],
)
def test_the_shape_of_a_plan(members: tuple[int, ...], sources: tuple[int, ...], blocks: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        validate_plan(MulticastPlan(members=members, sources=sources, blocks=blocks, rounds=()))


@given(st.lists(st.integers(), max_size=30, unique=True), st.integers(1, 5), st.data())
def test_moved_requests_even_out_the_loads(requests: list[int], count: int, data: st.DataObject) -> None:
    instances = list(range(100, 100 + count))
    loads = {i: data.draw(st.integers(0, 6)) for i in instances}
    moves = spread_requests(requests, instances, loads)
    assert [request for request, _ in moves] == requests
    final = dict(loads)
    for _, instance in moves:
        final[instance] += 1
    grown = [final[i] for i in instances if final[i] > loads[i]]
    assert not grown or max(grown) - min(final.values()) <= 1
