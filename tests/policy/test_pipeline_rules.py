"""Rules for pipelines: which one nodes form, if it forms at all, how many requests it gets, and how nodes leave it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from lambdascale.core import Send, Stage
from lambdascale.multicast import BinomialPipeline
from lambdascale.pipelines import ComplementaryPipelines, Costs, divide
from tests.policy.test_pipelines import by_arrivals, shown
from tests.policy.world import World

TWO = (Stage(1, 0, 1), Stage(2, 2, 3))
UNEVEN = (Stage(1, 0, 0), Stage(2, 1, 3))
TURNS = (Stage(1, 0, 0), Stage(2, 1, 1), Stage(1, 2, 2), Stage(2, 3, 3))
TIMES = Costs(round_s=1.0, batch_s=(2.0, 4.0), overhead_s=0.5, hop_s=(0.25, 0.5), requests=4)


@pytest.mark.parametrize(
    ("stages", "batch", "passes", "period"),
    [
        # 2 stages with half a second each, the whole model's time, the hop there and back; half of the model on each node.
        (TWO, 1, 1.0 + 2.0 + 0.5, 1.5),
        (TWO, 2, 1.0 + 4.0 + 1.0, 2.5),
        (UNEVEN, 2, 6.0, 3.5),
        (TURNS, 2, 2.0 + 4.0 + 2.0, 3.0),
        ((Stage(1, 0, 3),), 2, 4.5, 4.5),
    ],
)
def test_times_of_passes(stages: tuple[Stage, ...], batch: int, passes: float, period: float) -> None:
    assert (TIMES.pass_s(stages, batch), TIMES.period_s(stages, batch)) == (passes, period)
    assert TIMES.last_s(stages, batch) == passes + (len({s.node for s in stages}) - 1) * period


@pytest.mark.parametrize(
    ("requests", "left_s", "room"),
    [
        (4, 8.5, 4),  # two batches of two: 6 + 2.5
        (4, 8.4, 2),  # two batches of one: 3.5 + 1.5
        (4, 6.0, 2),
        (4, 5.9, 0),  # not even the first pass of what waits
        (1, 5.0, 2),  # one request waits: passes of one
        (1, 4.9, 0),
        (1, 3.4, 0),
        (100, 1e9, 4),  # full batches
    ],
)
def test_a_pipeline_gets_what_it_can_bring_to_first_tokens(requests: int, left_s: float, room: int) -> None:
    times = Costs(batch_s=(2.0, 4.0), overhead_s=0.5, hop_s=(0.25, 0.5), requests=requests)
    assert times.room(TWO, left_s) == room


@pytest.mark.parametrize(
    ("ready_s", "end_s", "saved"),
    [
        # Tokens at 6 and 8.5; without the pipeline at 10 + 4.5.
        (0.0, 10.0, 2 * (8.5 + 6.0)),
        (1.5, 10.0, 2 * (7.0 + 4.5)),
        (1.6, 10.0, 2 * 6.9),  # the second batch is too late and begins anew
        (4.1, 10.0, 0.0),
    ],
)
def test_waiting_saved_until_the_mode_switch(ready_s: float, end_s: float, saved: float) -> None:
    assert TIMES.saved_s(TWO, ready_s, (end_s, end_s), 2) == pytest.approx(saved)


@pytest.mark.parametrize(
    ("alone_from_s", "saved"),
    [
        # Tokens at 6 and 8.5; alone the nodes would have theirs 4.5 after they are complete.
        ((2.0, 10.0), 2 * (0.5 + 6.0)),
        ((1.0, 10.0), 2 * (-0.5 + 6.0)),  # the early node loses
        ((2.0, 8.0), 2 * (0.5 + 0.0)),  # the second batch is too late and begins anew
        ((2.0, 5.0), 2 * (6.5 - 9.5)),  # both do: the early node has waited for nothing
    ],
)
def test_waiting_saved_against_nodes_that_serve_alone_once_complete(alone_from_s: tuple[float, float], saved: float) -> None:
    assert TIMES.saved_s(TWO, 0.0, alone_from_s, 2) == pytest.approx(saved)


# In turn after 4 rounds, one stage each after 5, complete after 8.
EARLY_TURNS = ((0, 1, 2, 5, 3, 4, 6, 7), (3, 4, 6, 7, 5, 0, 1, 2))


@pytest.mark.parametrize(
    ("hop_s", "expected"),
    [
        # Four stages save 8 - 4 - 4 hops, two save 8 - 5 - 2 hops.
        (0.0, ["4 1:0-2 2:3-4 1:5-5 2:6-7"]),
        (0.4, ["4 1:0-2 2:3-4 1:5-5 2:6-7"]),
        (0.6, ["5 1:0-3 2:4-7"]),
        (1.4, ["5 1:0-3 2:4-7"]),
        (1.6, []),
    ],
)
def test_hops_decide_between_early_and_few_stages(hop_s: float, expected: list[str]) -> None:
    """Stages in turn are early, one stage a node is fast; with passes longer than what is left, none."""
    costs = Costs(hop_s=(hop_s,))
    assert shown(ComplementaryPipelines().pipelines(by_arrivals(*EARLY_TURNS), (), costs)) == expected


def test_round_robin_chunks_are_ready_as_early_as_their_blocks() -> None:
    """Issue: k = 4, 8 destinations: round 15 where 4 is possible."""
    plan = BinomialPipeline(chunks="round_robin").plan(sources=4, destinations=8, blocks=16)
    assert [p.ready_round for p in ComplementaryPipelines().pipelines(plan)] == [4, 5]
    always = ComplementaryPipelines(form="always").pipelines(plan, (), Costs(batch_s=(1e9,)))
    assert [p.form for p in always] == ["always", "always"], "formed although passes would take longer than all rounds"
    assert ComplementaryPipelines().pipelines(plan, (), Costs(batch_s=(1e9,))) == []


def test_nodes_that_would_be_late_are_left_out() -> None:
    """Nodes 1 and 3 hold the model together after two rounds; with node 2 between them, stages cost more than they give."""
    orders = ((0, 1, 2, 3), (0, 1, 2, 3), (2, 3, 0, 1))
    assert shown(ComplementaryPipelines().pipelines(by_arrivals(*orders), (), Costs(overhead_s=0.6))) == ["2 1:0-1 3:2-3"]


def test_division_of_what_nodes_hold() -> None:
    assert divide({1: {0, 1, 2}, 2: {2, 3}}, 4) == (Stage(1, 0, 1), Stage(2, 2, 3))
    assert divide({1: {0, 2}, 2: {1, 3}}, 4) == (Stage(1, 0, 0), Stage(2, 1, 1), Stage(1, 2, 2), Stage(2, 3, 3))
    assert divide({1: {0, 1, 2}, 2: {0, 1, 2}}, 4) is None


def test_nodes_are_ordered_by_what_they_hold_so_that_each_has_one_stage() -> None:
    """Nodes in the order of their ids could only take turns: 2:0-1, 1:2-4, 1:5-5."""
    assert divide({1: {2, 3, 4, 5}, 2: {0, 1}}, 6) == (Stage(2, 0, 1), Stage(1, 2, 5))


@pytest.mark.parametrize(("switch", "expected"), [("all", ["2 1:0-1 2:2-3"]), ("each", []), ("cheapest", ["2 1:0-1 2:2-3"])])
def test_a_pipeline_lasts_until_all_its_nodes_are_complete_or_the_first_one(switch: str, expected: list[str]) -> None:
    """A pass takes three rounds from round 2 on; node 1 is complete after round 4, node 2 after round 8."""
    pairs = {1: [(1, 0), (2, 2)], 2: [(1, 1), (2, 3)], 3: [(1, 2)], 4: [(1, 3)], 7: [(2, 0)], 8: [(2, 1)]}
    plan = structs.replace(
        by_arrivals((0, 1, 2, 3), (2, 3, 0, 1)),
        rounds=tuple(tuple(Send(0, node, block) for node, block in pairs.get(r, ())) for r in range(1, 9)),
    )
    builder = ComplementaryPipelines(switch=switch)  # type: ignore[arg-type]  # a parameter's type is any text
    assert shown(builder.pipelines(plan, (), Costs(batch_s=(3.0,)))) == expected


TWO_PIPELINES = ["2 1:0-1 2:2-3", "4 3:0-1 4:2-3"]


@pytest.mark.parametrize(
    ("switch", "expected"),
    [("all", ["2 1:0-0 1:1-1 2:2-2 2:3-3"]), ("each", TWO_PIPELINES), ("cheapest", TWO_PIPELINES)],
)
def test_early_nodes_are_not_counted_as_late_as_those_beside_them(switch: str, expected: list[str]) -> None:
    """Nodes 1 and 2 are complete after round 3, nodes 3 and 4 after 12: these gain most, in a pipeline of their own.

    Mutations: the last node's time for all, stages or not; the nodes without a stage counted as well.
    """
    late = {1: (1, 2, 3, 3), 2: (3, 3, 1, 2), 3: (2, 4, 12, 12), 4: (12, 12, 2, 4)}
    sends = [[Send(0, node, block) for node in late for block in range(4) if late[node][block] == r] for r in range(1, 13)]
    orders = [sorted(range(4), key=rounds.__getitem__) for rounds in late.values()]
    plan = structs.replace(by_arrivals(*orders), rounds=tuple(map(tuple, sends)))
    builder = ComplementaryPipelines(switch=switch)  # type: ignore[arg-type]  # a parameter's type is any text
    found = builder.pipelines(plan)
    assert shown(found) == expected
    assert {p.switch for p in found} == {"each" if switch == "each" else "all"}


@pytest.mark.parametrize(("requests", "batch"), [(1, 1), (2, 1), (3, 2), (4, 2), (9, 4), (0, 1)])
def test_waiting_requests_are_shared_out_in_whole_batches(requests: int, batch: int) -> None:
    assert Costs(batch_s=(1.0, 2.0, 3.0, 4.0), requests=requests).batch(2) == batch


# -- formed or not ---------------------------------------------------------------------------------------------------


def arriving(pace_s: float, *, requests: int = 9, prompt: int = 470, **settings: object) -> tuple[World, list[str]]:
    """Two replicas; blocks come to nodes 2 and 3 every ``pace_s``: the commands of the block that makes a pipeline possible.

    A first pass of two requests of 470 tokens takes 0.197 s, of one 0.099; a round of the plan should take 0.31 s.
    """
    slow_links = {"nic_bytes_per_s": 1e9}
    world = World(nodes=4, min_replicas=2, cluster=slow_links, **({"form": "useful"} | settings))
    world.arrive(requests, prompt=prompt, output=100)
    world.tick()
    lines: list[str] = []
    for block in range(2):
        world.at += pace_s
        lines = world.block(2, block)
        assert not lines
        lines = world.block(3, 2 + block)
    return world, lines


@pytest.mark.parametrize(
    ("pace_s", "expected"),
    [
        (0.25, ["serve i3 2:0-1,3:2-3", "dispatch i3 4,5,6,7"]),  # half a second is left: 0.2 s and 0.1 s behind it
        (0.13, ["serve i3 2:0-1,3:2-3", "dispatch i3 4,5"]),  # 0.26 s are left: the second batch of two would be late
        (0.09, []),  # 0.18 s are left: less than a first pass
    ],
)
def test_a_pipeline_forms_if_there_is_time_for_a_first_pass(pace_s: float, expected: list[str]) -> None:
    """Mutation: a pipeline that its mode switch ends before a token."""
    assert arriving(pace_s)[1] == expected
    assert arriving(pace_s, form="always")[1] == ["serve i3 2:0-1,3:2-3", "dispatch i3 4,5,6,7"]


@pytest.mark.parametrize(("switch", "expected"), [("all", "serve i3 2:0-1,3:2-3"), ("each", None)])
def test_the_time_left_depends_on_how_nodes_leave(switch: str, expected: str | None) -> None:
    """Node 2 is complete in 0.125 s, less than a pass takes, node 3 in 0.5 s. Mutation: the first node's time for both."""
    world = World(nodes=4, min_replicas=2, cluster={"nic_bytes_per_s": 1e9}, form="useful", switch=switch)
    world.arrive(9, prompt=470, output=100)
    world.tick()
    world.at = 0.25
    assert world.block(2, 0) + world.block(3, 2) == []
    world.at = 0.5
    assert world.block(2, 1, 2) == []
    assert next(iter(world.block(3, 3)), None) == expected


def test_short_prompts_make_a_late_pipeline_useful() -> None:
    assert arriving(0.09, prompt=100)[1] == ["serve i3 2:0-1,3:2-3", "dispatch i3 4,5,6,7"]


def test_a_pipeline_gets_no_requests_that_it_would_not_bring_to_a_token() -> None:
    """Mutation: the look ahead forgotten. With one block missing on each node, 0.07 s are left: less than a pass of one."""
    world, _ = arriving(0.13, switch="all")
    assert world.finish(4) == ["dispatch i3 6"], "two blocks are missing"
    world.at += 0.01
    assert world.block(2, 2) + world.block(3, 0) == []
    assert world.finish(6) == [], "the others wait for a replica"
    assert world.block(2, 3) == []
    assert world.block(3, 1) == ["serve i4 2", "serve i5 3", "switch i3 5>i4 recompute", "dispatch i5 7", "dispatch i4 8"]


@pytest.mark.parametrize(("switch", "expected"), [("all", ["dispatch i3 7"]), ("cheapest", ["dispatch i3 7"]), ("each", [])])
def test_the_look_ahead_is_to_the_node_at_which_the_pipeline_ends(switch: str, expected: list[str]) -> None:
    """Node 2 is complete in 0.07 s, less than a pass takes, node 3 in 0.28 s. Mutations: the other node's time; either's."""
    world, _ = arriving(0.13, switch=switch)
    assert world.finish(4) == ["dispatch i3 6"]
    world.at += 0.01
    assert world.block(2, 2) == []
    assert world.finish(6) == expected


def test_a_closed_pipeline_takes_requests_again_when_the_mode_switch_is_further_off() -> None:
    """The last block but one takes a second longer than expected. Mutation: a pipeline once closed stays so."""
    world, _ = arriving(0.13, switch="all")
    world.finish(4)
    world.at += 0.01
    world.block(2, 2)
    world.block(3, 0)
    assert world.finish(6) == [], "closed"
    world.at += 1.0
    assert world.block(2, 3) == ["dispatch i3 7"], "node 3 needs half a second more"
    assert world.finish(5) == ["dispatch i3 8"]


# -- how nodes leave -------------------------------------------------------------------------------------------------


def trio(*, prompt: int = 10, **settings: Any) -> World:
    """Three nodes load for themselves; pipeline i1 serves on 0:0-0,1:1-2,2:3-3 and has six requests."""
    world = World(nodes=3, min_replicas=0, **settings)
    world.arrive(6, prompt=prompt)
    world.tick()
    world.block(0, 0)
    world.block(1, 1)
    world.block(2, 2, 3)
    assert world.block(1, 2) == ["serve i1 0:0-0,1:1-2,2:3-3", "dispatch i1 0,1,2,3,4,5"]
    return world


@pytest.mark.parametrize("switch", ["all", "cheapest"])
def test_all_nodes_switch_together(switch: str) -> None:
    world = trio(switch=switch)
    assert world.block(1, 3, 0) + world.block(0, 1, 2, 3) == []
    assert world.block(2, 0, 1) == [
        *["serve i2 0", "serve i3 1", "serve i4 2"],
        "switch i1 0>i2,1>i3,2>i4,3>i2,4>i3,5>i4 recompute",
    ]


def test_each_node_leaves_when_it_is_complete_and_the_others_go_on() -> None:
    """Paper, 4.4. The smaller pipeline gets two thirds of the requests. Mutation: requests spread by instance."""
    world = trio(switch="each")
    assert world.block(0, 1, 2) == []
    assert world.block(1, 3, 0) == ["serve i2 1", "serve i3 0:0-1,2:2-3", "switch i1 0>i2,1>i3,2>i3,3>i2,4>i3,5>i3 recompute"]
    assert world.block(0, 3) == [], "node 2 cannot go on alone: the last two leave together"
    assert world.block(2, 0, 1) == ["serve i4 0", "serve i5 2", "switch i3 1>i4,2>i5,4>i4,5>i5 recompute"]


def test_a_node_stays_until_the_others_can_do_without_its_blocks() -> None:
    """Mutation: looked at only when a node is complete, so that it stays until the next one is."""
    world = trio(switch="each")
    assert world.block(1, 3, 0) == [], "nodes 0 and 2 lack block 1"
    assert world.block(0, 1) == ["serve i2 1", "serve i3 0:0-1,2:2-3", "switch i1 0>i2,1>i3,2>i3,3>i2,4>i3,5>i3 recompute"]


def leaving(last_s: float, running: int | None = None) -> tuple[World, list[str]]:
    """Node 1 of three is complete, ``last_s`` after node 2's first block; node 2 lacks one, due in ``last_s`` / 2, node 0 two.

    Nine requests of 900 tokens: a first pass of two takes 0.37 s, of one half of that, and half as long behind another.
    All that have come end before, but ``running``. Returns the commands then.
    """
    world = World(nodes=3, min_replicas=0, form="useful", switch="each")
    world.arrive(9, prompt=900, output=100)
    world.tick()
    world.block(0, 0)
    world.block(1, 1)
    world.at += 1.0
    world.block(2, 2)
    world.at += last_s / 2
    world.block(2, 3)
    assert world.block(1, 2)[0] == "serve i1 0:0-0,1:1-2,2:3-3"
    world.block(1, 3)
    world.at += last_s / 2
    assert world.block(2, 0) + world.block(0, 1) == []
    if running is not None:
        for request in range(9 - running):
            world.finish(request)
    return world, world.block(1, 0)


def test_the_smaller_pipeline_is_limited_by_the_time_until_its_own_mode_switch() -> None:
    """0.45 s are left: enough for a request on each of its nodes. Mutation: as many as it has places for, four."""
    world, lines = leaving(0.9, running=3)
    assert lines == ["serve i2 1", "serve i3 0:0-1,2:2-3", "switch i1 6>i2,7>i3,8>i3 recompute"]
    assert world.arrive(2, prompt=900) == ["dispatch i2 9"], "it has the two it can bring to their tokens"
    assert world.finish(7) == ["dispatch i3 10"]


def test_a_node_stays_while_the_others_would_bring_requests_to_no_token() -> None:
    """Node 2 is complete in 0.25 s. Mutation: all requests moved to the one complete node, which has places for two."""
    world, lines = leaving(0.5, running=3)
    assert lines == []
    assert world.block(2, 1) == ["serve i2 1", "serve i3 2", "switch i1 6>i2,7>i3,8>i2 recompute"], "two nodes can take them all"


def test_a_node_stays_while_the_others_would_keep_more_than_they_bring_to_a_token() -> None:
    """The other nodes would keep four of six requests, and bring two to a token. Mutation: what runs is not counted."""
    world, lines = leaving(0.9)
    assert lines == []
    assert world.finish(0) == ["dispatch i1 6"], "and takes further requests: the node that is complete does not leave soon"


def test_a_complete_node_takes_what_it_has_places_for() -> None:
    """Paper, 4.4: running requests move to local nodes. Mutation: it stays, since the others would bring no token."""
    assert leaving(0.5, running=2)[1] == ["serve i2 1", "switch i1 7>i2,8>i2 recompute"]
