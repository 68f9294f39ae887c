"""Quality of plans beside their validity: rounds near a bound found by counting, spread work, exact small plans."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.faasnet import BalancedTree, PrototypeTree
from baselines.nccl_broadcast import Chain
from lambdascale.core import MulticastPlan, PlanError, Send
from lambdascale.core.units import parse_size
from lambdascale.multicast import (
    BinomialPipeline,
    MulticastPlanner,
    arrival_rounds,
    check_counts,
    chunk_blocks,
    completion_rounds,
    injection_orders,
    near_equal_groups,
    orders_between,
    plan_from_holdings,
    validate_plan,
)
from lambdascale.multicast.elbow import elbow, multicast_s


def shown(plan: MulticastPlan) -> list[str]:
    """Rounds like 0>1:0 1>2:3."""
    return [" ".join(f"{s.src}>{s.dst}:{s.block}" for s in sends) for sends in plan.rounds]


# -- repair ----------------------------------------------------------------------------------------------------------


def fewest_rounds(holdings: Mapping[int, Collection[int]], destinations: Sequence[int], blocks: int) -> int:
    """A lower bound by counting, with one send and one receive a round per node.

    A node receives what it lacks, one block a round. All copies that are lacking leave the nodes that live, one a node and round.
    The holders of a block at most double every round.
    """
    lacking = [blocks - len(set(holdings.get(node, ()))) for node in destinations]
    bounds = [max(lacking, default=0), ceil(sum(lacking) / max(1, len({*holdings, *destinations})))]
    for block in range(blocks):
        have = sum(block in held for held in holdings.values())
        wanting = sum(block not in holdings.get(node, ()) for node in destinations)
        if wanting:
            bounds.append(ceil(log2((have + wanting) / have)))
    return max(bounds)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_repairs_take_at_most_twice_the_rounds_that_counting_allows_and_two_more(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 16))
    partial = data.draw(st.lists(st.sets(st.integers(0, blocks - 1)), min_size=1, max_size=8))
    full = data.draw(st.integers(1, 3))
    holdings = {10 + i: held for i, held in enumerate(partial)} | {50 + i: set(range(blocks)) for i in range(full)}
    destinations = [10 + i for i in range(len(partial))]
    plan = plan_from_holdings(holdings, destinations, blocks)
    validate_plan(plan, holdings=holdings)
    assert len(plan.rounds) <= 2 * fewest_rounds(holdings, destinations, blocks) + 2


@pytest.mark.parametrize("lost", range(1, 8))
@pytest.mark.parametrize("after", [1, 4, 8, 12, 16])
def test_repair_of_a_broken_binomial_pipeline_is_near_the_bound(lost: int, after: int) -> None:
    """λScale's case: one of 7 destinations is lost; at most half more rounds than counting allows, and one."""
    plan = BinomialPipeline().plan(sources=1, destinations=7, blocks=16)
    held: dict[int, set[int]] = {node: set() for node in range(8)} | {0: set(range(16))}
    for sends in plan.rounds[:after]:
        for send in sends:
            held[send.dst].add(send.block)
    del held[lost]
    destinations = [node for node in held if node]
    repaired = plan_from_holdings(held, destinations, 16)
    validate_plan(repaired, holdings=held)
    assert len(repaired.rounds) <= 1.5 * fewest_rounds(held, destinations, 16) + 1


def test_the_rarest_block_is_repaired_first() -> None:
    """Mutation: the most-held block first. Block 2 has one holder, 1 two, 0 three."""
    holdings = {1: {0, 1, 2}, 2: {0, 1}, 3: {0}, 4: set[int]()}
    plan = plan_from_holdings(holdings, [4], 3)
    assert shown(plan) == ["1>4:2", "2>4:1", "3>4:0"]
    assert plan.sources == (1, 2, 3)


def test_the_node_that_lacks_most_takes_first_and_the_sender_is_the_one_that_sent_least() -> None:
    holdings = {1: {0, 1, 2, 3}, 2: {0, 1, 2, 3}, 5: {0}, 6: set[int]()}
    plan = plan_from_holdings(holdings, [5, 6], 4)
    assert shown(plan)[0] == "1>6:1 2>5:1", "6 lacks more; 1 and 2 have sent nothing; blocks 1 to 3 are equally rare"
    assert max(sum(s.src == node for sends in plan.rounds for s in sends) for node in (1, 2)) <= 4
    assert len(plan.rounds) == 4


def test_only_holders_that_send_are_sources_and_destinations_are_named_once() -> None:
    plan = plan_from_holdings({9: {0}, 8: {0}, 3: set[int]()}, [3, 3], 1)
    assert (plan.members, plan.sources, plan.groups, plan.blocks) == ((8, 3), (8,), ((8, 3),), 1)
    assert shown(plan) == ["8>3:0"]


def test_a_node_never_takes_from_itself_and_newcomers_hold_nothing() -> None:
    plan = plan_from_holdings({1: {0}, 2: {1}}, [1, 2, 7], 2)
    validate_plan(plan, holdings={1: {0}, 2: {1}})
    assert plan.sources == ()
    assert len(plan.rounds) == 2


def test_nothing_lacking_is_an_empty_plan_and_a_lost_block_an_error_only_if_somebody_wants_it() -> None:
    assert plan_from_holdings({1: {0, 1}}, [1], 2).rounds == ()
    assert plan_from_holdings({1: {0}}, [], 2).rounds == ()
    with pytest.raises(PlanError, match="no survivor holds block 1"):
        plan_from_holdings({1: {0}}, [2], 2)


# -- exact small plans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planner", "sources", "destinations", "blocks", "expected"),
    [
        (BinomialPipeline(), 1, 1, 3, ["0>1:0", "0>1:1", "0>1:2"]),
        (BinomialPipeline(), 1, 2, 2, ["0>1:0", "1>2:0 0>1:1", "1>2:1"]),
        (BinomialPipeline(), 1, 3, 2, ["0>1:0", "0>2:1 1>3:0", "0>1:1 2>3:1 3>2:0"]),
        (BinomialPipeline(), 2, 2, 2, ["0>2:0 1>3:1", "0>2:1 1>3:0"]),
        (BinomialPipeline(order="none"), 2, 2, 2, ["0>2:0 1>3:0", "0>2:1 1>3:1"]),
        (BinomialPipeline(chunks="round_robin"), 2, 2, 4, ["0>2:0 1>3:1", "0>2:2 1>3:3", "0>2:1 1>3:0", "0>2:3 1>3:2"]),
        (BinomialPipeline(), 3, 1, 1, ["0>3:0"]),
        (BinomialPipeline(), 1, 0, 1, []),
        (BalancedTree(), 1, 3, 2, ["0>1:0", "0>2:0 1>3:0", "0>1:1", "0>2:1 1>3:1"]),
        (PrototypeTree(), 1, 2, 2, ["0>1:0", "1>2:0", "0>1:1", "1>2:1"]),
        (PrototypeTree(), 1, 1, 2, ["0>1:0", "0>1:1"]),
        (Chain(), 1, 2, 2, ["0>1:0", "0>1:1 1>2:0", "1>2:1"]),
        (Chain(), 2, 3, 2, ["0>2:0 1>3:0", "0>2:1 1>3:1 3>4:0", "3>4:1"]),
        (Chain(), 1, 0, 2, []),
    ],
)
def test_plans_worked_out_by_hand(
    planner: MulticastPlanner, sources: int, destinations: int, blocks: int, expected: list[str]
) -> None:
    assert shown(planner.plan(sources=sources, destinations=destinations, blocks=blocks)) == expected


@pytest.mark.parametrize("planner", [BinomialPipeline(), BalancedTree(), PrototypeTree()])
def test_plans_name_their_groups_and_orders(planner: MulticastPlanner) -> None:
    plan = planner.plan(sources=2, destinations=3, blocks=2)
    assert plan.members == (0, 1, 2, 3, 4)
    assert plan.sources == (0, 1)
    assert plan.groups == ((0, 2), (1, 3, 4))
    assert plan.orders == (((0, 1), (1, 0)) if isinstance(planner, BinomialPipeline) else ((0, 1), (0, 1)))
    assert plan.blocks == 2
    assert not plan.streaming


def test_chains_share_nothing() -> None:
    plan = Chain().plan(sources=3, destinations=2, blocks=3)
    assert (plan.members, plan.sources, plan.groups) == ((0, 1, 2, 3, 4), (0, 1, 2), ((0, 3), (1, 4)))


@pytest.mark.parametrize("planner", [BinomialPipeline(), BalancedTree(), PrototypeTree(), Chain()])
@pytest.mark.parametrize(("sources", "destinations"), [(1, 3), (2, 5), (3, 8), (4, 2)])
def test_the_parts_of_a_plan_are_plans(planner: MulticastPlanner, sources: int, destinations: int) -> None:
    """Each sub-group by itself; together the same sends in the same rounds."""
    plan = planner.plan(sources=sources, destinations=destinations, blocks=4)
    parts = plan.parts()
    assert len(parts) == len(plan.groups) == min(sources, destinations)
    for part, group in zip(parts, plan.groups, strict=True):
        validate_plan(part)
        assert (part.members, part.sources, part.streaming) == (group, group[:1], plan.streaming)
        assert part.rounds[-1]
    for number, sends in enumerate(plan.rounds):
        assert {s for part in parts if number < len(part.rounds) for s in part.rounds[number]} == set(sends)


@pytest.mark.parametrize("nodes", [3, 5, 6, 7, 11, 13])
def test_a_pair_mirrors_within_two_rounds(nodes: int) -> None:
    """Blocks are at both nodes of a pair at most two rounds apart (module docstring: each holds at most one the other lacks)."""
    plan = BinomialPipeline().plan(sources=1, destinations=nodes - 1, blocks=9)
    arrivals, count = arrival_rounds(plan), 1 << nodes.bit_length() - 1
    for node in range(count, nodes):
        twin = node - count + 1
        for number in range(1, len(plan.rounds)):
            alone = [b for b in range(9) if arrivals[twin][b] <= number < arrivals[node][b]]
            assert len(alone) <= 1


# -- parts -----------------------------------------------------------------------------------------------------------


def test_groups_worked_out_by_hand() -> None:
    assert near_equal_groups(2, 5) == ((0, 2, 3), (1, 4, 5, 6))
    assert near_equal_groups(3, 2) == ((0, 3), (1, 4))
    assert near_equal_groups(2, 0) == ((0,),)


def test_chunks_worked_out_by_hand() -> None:
    assert chunk_blocks(7, 3) == ((0, 1), (2, 3), (4, 5, 6))
    assert chunk_blocks(7, 3, "round_robin") == ((0, 3, 6), (1, 4), (2, 5))


def test_injection_orders_worked_out_by_hand() -> None:
    assert injection_orders(4, 2) == ((0, 1, 2, 3), (2, 3, 0, 1))
    assert injection_orders(6, 3) == ((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 0, 1), (4, 5, 0, 1, 2, 3))
    assert injection_orders(8, 4, "half") == (
        (0, 1, 2, 3, 4, 5, 6, 7),
        (4, 5, 6, 7, 0, 1, 2, 3),
        (0, 1, 2, 3, 4, 5, 6, 7),
        (4, 5, 6, 7, 0, 1, 2, 3),
    )
    assert injection_orders(4, 2, "none") == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert injection_orders(4, 2, chunks="round_robin") == ((0, 2, 1, 3), (1, 3, 0, 2))


@pytest.mark.parametrize(
    ("blocks", "starts", "count", "begins"),
    [
        (16, (), 4, (0, 4, 8, 12)),
        (16, (0,), 1, (8,)),
        (16, (0,), 3, (4, 8, 12)),
        (16, (0, 4, 8, 12), 4, (2, 6, 10, 14)),
        (16, (0, 4, 8, 12), 1, (2,)),
        (16, (0, 4, 8, 12), 6, (1, 2, 5, 6, 10, 14)),  # the first gaps get two, a third of the way each, rounded down
        (16, (0, 0, 8), 2, (4, 12)),
        (16, (3, 2, 1, 0), 3, (6, 9, 12)),  # round-robin chunks: one wide gap
        (4, (2,), 2, (3, 0)),  # across the end
        (4, (0, 2), 4, (0, 1, 2, 3)),
        (2, (0, 1), 1, (0,)),  # no block is left to begin with
    ],
)
def test_orders_begin_where_others_leave_most_blocks(
    blocks: int, starts: tuple[int, ...], count: int, begins: tuple[int, ...]
) -> None:
    orders = orders_between(blocks, starts, count)
    assert tuple(order[0] for order in orders) == begins
    assert all(order == tuple((order[0] + step) % blocks for step in range(blocks)) for order in orders)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0, 1, 1), "a multicast needs at least 1 sources, not 0"),
        ((1, -1, 1), "a multicast needs at least 0 destinations, not -1"),
        ((1, 1, 0), "a multicast needs at least 1 blocks, not 0"),
    ],
)
def test_counts_are_checked(counts: tuple[int, int, int], message: str) -> None:
    check_counts(1, 0, 1)
    with pytest.raises(PlanError, match=message):
        check_counts(*counts)


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="order"):
        BinomialPipeline(order="backwards")


def test_arrivals_and_completions_of_a_plan() -> None:
    plan = MulticastPlan(
        members=(0, 1, 2, 3), sources=(0,), blocks=2, rounds=((Send(0, 1, 1),), (Send(0, 1, 0), Send(1, 2, 1)), (Send(2, 0, 1),))
    )
    assert arrival_rounds(plan) == {1: {1: 1, 0: 2}, 2: {1: 2}, 3: {}, 0: {1: 3}}
    assert completion_rounds(plan) == {1: 2, 2: 2, 3: 0}


def test_the_elbow_is_the_fewest_blocks_that_are_nearly_as_good_as_the_best() -> None:
    size, rate, overhead = parse_size("1GB"), 1e9, 0.001
    # 4 nodes: (b + 1) (1 / b + 0.001) seconds.
    assert multicast_s(size, 10, 4, rate, overhead) == pytest.approx(11 * 0.101)
    choices = [1, 2, 4, 8, 16, 32, 64]
    times = {b: multicast_s(size, b, 4, rate, overhead) for b in choices}
    assert min(times, key=lambda b: times[b]) == 32
    assert elbow(size, choices, 4, rate, overhead) == 8
    assert elbow(size, choices, 4, rate, overhead, tolerance=0.0) == 32
    assert elbow(size, choices, 4, rate, overhead, tolerance=0.5) == 2
    assert elbow(size, [7], 2, rate, overhead) == 7
    for wrong in (([], 4), ([4], 1)):
        with pytest.raises(ValueError, match="an elbow needs choices and at least 2 nodes, not"):
            elbow(size, wrong[0], wrong[1], rate, overhead)
