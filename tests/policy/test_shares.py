"""Shares of a model and moved boundaries, with the two small start policies of lambdascale.testing.starts."""

from __future__ import annotations

import pytest

from lambdascale.testing.starts import CooperativeStart, SpreadStart
from lambdascale.testing.systems import small_cluster, with_kv_tokens
from tests.policy.world import World, without


def spread(nodes: int = 4, requests: int = 4, **settings: object) -> World:
    """A cold start over four nodes with a block each: loads t1 to t4."""
    world = World(nodes=nodes, min_replicas=0, max_replicas=1, start=SpreadStart(), kv="copy", **settings)
    world.arrive(requests)
    assert without(world.tick(), "timer") == [
        *["allocate 0", "allocate 1", "allocate 2", "allocate 3"],
        *["load t1 0 ssd 0", "load t2 1 ssd 1", "load t3 2 ssd 2", "load t4 3 ssd 3"],
    ]
    return world


def spread_serving(**settings: object) -> World:
    """The same when the pipeline serves and node 0 loads the rest: load t5."""
    world = spread(**settings)
    for transfer in ("t1", "t2", "t3"):
        assert world.deliver(transfer) == []
    lines = world.deliver("t4")
    assert lines[:2] == ["serve i1 0:0-0,1:1-1,2:2-2,3:3-3", "dispatch i1 0,1,2,3"]
    return world


def test_shares_add_up_to_one_replica() -> None:
    world = spread()
    assert world.tick() == ["timer 0.2"], "one replica is wanted, four quarters are on their way"


def test_shares_of_one_replica_are_not_taken_for_several() -> None:
    """Four quarters, and two replicas wanted. Mutations: a share counted as a replica, or as more."""
    world = World(nodes=8, min_replicas=0, start=SpreadStart())
    world.arrive(2)
    world.tick()
    world.arrive(2)
    assert without(world.tick(), "timer", "load") == ["allocate 4", "allocate 5", "allocate 6", "allocate 7"]


def test_a_spread_replica_is_consolidated_onto_its_first_node() -> None:
    world = spread_serving()
    assert world.open_transfers() == ["t5"]
    assert world.command("t5").blocks == (1, 2, 3)
    assert world.deliver("t5", 2) == []
    assert world.deliver("t5") == ["reshape i1 0:0-3 copy", "release 1", "release 2", "release 3"], "no copy of a share stays"
    assert world.arrive(1) == [], "one node's slots: two, and four requests are running"
    assert world.finish(0, 1) == []
    assert world.finish(2) == ["dispatch i1 4"]


def test_a_lost_share_makes_the_others_whole() -> None:
    world = spread_serving()
    lines = without(world.lose(2), "timer")
    assert lines[0] == "stop i1"
    assert lines[1:] == ["load t6 1 ssd 023", "load t7 3 ssd 012"], "node 0 loads its rest already"
    assert world.deliver("t5") == ["serve i2 0", "dispatch i2 0,1"]
    assert world.deliver("t6") == ["serve i3 1", "dispatch i3 2,3"]


def test_partners_of_a_pipeline_that_never_formed_are_made_whole_too() -> None:
    world = spread()
    world.deliver("t1")
    assert without(world.lose(1), "timer") == ["cancel t2", "load t5 0 ssd 123", "load t6 2 ssd 013", "load t7 3 ssd 012"]
    assert world.deliver("t3") == []
    assert world.deliver("t5") == ["serve i1 0", "dispatch i1 0,1"]


def test_a_failed_load_of_a_share_gives_its_node_up_and_makes_the_others_whole() -> None:
    world = spread_serving()
    assert world.fail(transfer="t5") == [
        *["cancel t5", "stop i1", "release 0"],
        *["load t6 1 ssd 023", "load t7 2 ssd 013", "load t8 3 ssd 012"],
    ]


@pytest.mark.parametrize(("copies", "tier"), [(0, "ssd"), (4, "host")])
def test_loads_of_shares_that_fail_before_the_pipeline_forms(copies: int, tier: str) -> None:
    """Mutations: the other shares left to wait for ever; a node released while the load of the rest is under way on it."""
    world = World("serverlessllm", min_replicas=0, copies=copies, start=SpreadStart())
    world.arrive(1)
    world.tick()
    world.block(2, 2)
    assert world.fail(transfer="t1") == [
        *("cancel t1", "release 0"),
        *(f"load t5 1 {tier} 023", f"load t6 2 {tier} 013", f"load t7 3 {tier} 012"),
    ]
    assert world.fail(transfer="t2") == ["cancel t2", "cancel t5", "release 1"]
    assert world.deliver("t6") == ["serve i1 2", "dispatch i1 0"]
    assert world.deliver("t4") + world.deliver("t7") == ["serve i2 3"]


def test_spread_replicas_are_released_together() -> None:
    world = spread_serving(keep_alive_s=0.0)
    world.finish(0, 1, 2, 3)
    assert world.tick() == ["timer 0.2"], "node 0 is still loading"
    world.deliver("t5")
    assert world.tick() == ["stop i1", "release 0 keep"]


def test_consolidated_replicas_are_whole() -> None:
    """Mutation: each still counted as the share that it began with, so that none is ever to spare."""
    world = World(nodes=4, min_replicas=0, keep_alive_s=0.0, start=SpreadStart(nodes=2), kv="copy")
    world.arrive(4)
    world.tick()
    while transfers := world.open_transfers():
        for transfer in transfers:
            world.deliver(transfer)
    assert sorted(world.plane.fleet.models["a"].allocations) == [0, 2]
    assert without(world.tick(), "timer") == []
    world.finish(0, 1)
    assert without(world.tick(), "timer") == ["stop i2", "release 2 keep"], "i1 has both requests that are left"


def cooperating(requests: int = 4) -> World:
    """Replica i1 on node 0 with requests 0 and 1; t2 brings the model to node 1 in order."""
    world = World(nodes=2, start=CooperativeStart(), kv="copy")
    world.arrive(requests)
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t2 0:gpu>1"]
    return world


def test_the_boundary_moves_with_every_block_and_both_serve_alone_in_the_end() -> None:
    world = cooperating()
    assert world.deliver("t2", 1) == ["reshape i1 1:0-0,0:1-3 copy", "dispatch i1 2,3"], "two nodes, two batches"
    assert world.deliver("t2", 1) == ["reshape i1 1:0-1,0:2-3 copy"]
    assert world.deliver("t2", 1) == ["reshape i1 1:0-2,0:3-3 copy"]
    assert world.deliver("t2") == ["serve i2 1", "serve i3 0", "switch i1 0>i2,1>i3,2>i2,3>i3 copy"]


def test_a_lost_destination_gives_the_source_its_requests_back() -> None:
    world = cooperating()
    world.deliver("t2", 2)
    assert world.lose(1) == ["cancel t2", "stop i1", "serve i2 0", "dispatch i2 0,1"]


def test_a_lost_source_restarts_the_requests_at_the_destination_once_it_is_complete() -> None:
    world = cooperating()
    world.deliver("t2", 2)
    assert world.lose(0) == ["cancel t2", "stop i1", "load t3 1 ssd 23"]
    assert world.deliver("t3") == ["serve i2 1", "dispatch i2 0,1"]


def test_a_boundary_that_moves_to_less_kv_memory_restarts_the_requests_that_may_need_more() -> None:
    """Node 1 has room for 300 tokens, request 0 may need 301: it waits until node 0 serves alone again."""
    overrides = with_kv_tokens(small_cluster(), 300, (1,)).overrides
    world = World(nodes=2, start=CooperativeStart(), kv="copy", cluster={"overrides": overrides})
    world.arrive(1, prompt=290, output=11)
    world.arrive(3)
    world.tick()
    assert world.deliver("t2", 1) == ["stop i1", "serve i2 1:0-0,0:1-3"]
    assert world.deliver("t2", 2)[-1] == "reshape i2 1:0-2,0:3-3 copy"
    assert world.deliver("t2") == ["serve i3 1", "serve i4 0", "switch i2  copy", "dispatch i4 0,3", "dispatch i3 1,2"]


def test_a_boundary_moves_to_memory_that_a_request_fits_exactly() -> None:
    """Mutation: it is restarted."""
    overrides = with_kv_tokens(small_cluster(), 300, (1,)).overrides
    world = World(nodes=2, start=CooperativeStart(), kv="copy", cluster={"overrides": overrides})
    world.arrive(1, prompt=290, output=10)
    world.arrive(3)
    world.tick()
    assert world.deliver("t2", 1)[0] == "reshape i1 1:0-0,0:1-3 copy"
