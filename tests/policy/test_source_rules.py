"""Source rules: which of several holders feeds, who waits for one, and copies that last while they are read."""

from __future__ import annotations

import pytest

from lambdascale.core.events import NodeJoined
from tests.policy.world import World, without


@pytest.mark.parametrize("system", ["lambdascale", "faasnet", "nccl_broadcast"])
def test_of_idle_replicas_the_node_with_the_smallest_id_feeds(system: str) -> None:
    """Node 0 came back and joined after 1. Mutation: sources in the order in which they joined."""
    world = World(system, nodes=3, min_replicas=2)
    world.play(NodeJoined(0.0, 0))
    assert without(world.tick(), "timer") == ["allocate 0", "multicast t3 1:gpu>0"]
    world.deliver("t3")
    world.arrive(5)
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t4 0:gpu>2"]


def test_a_node_waits_for_one_that_still_loads_its_host_copy() -> None:
    """Mutation: node 0 no holder of its copy while it loads it, and node 1 sent to its SSD."""
    world = World("lambdascale", nodes=3, copies=1, min_replicas=0)
    world.arrive(2)
    assert without(world.tick(), "timer") == ["allocate 0", "load t1 0 host 0123"]
    world.arrive(2)
    assert without(world.tick(), "timer") == []
    world.deliver("t1")
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t2 0:gpu>1"]


def test_a_standing_tree_has_no_place_for_nodes_that_load_from_storage() -> None:
    """Node 1 still loads. Mutation: it is a parent in the tree."""
    world = World("faasnet", nodes=4, min_replicas=0, target=1, source_rule="StandingTree")
    world.arrive(2)
    assert without(world.tick(), "timer", "allocate") == ["load t1 0 ssd 0123", "load t2 1 ssd 0123"]
    world.deliver("t1")
    world.arrive(2)
    assert without(world.tick(), "timer", "allocate") == ["multicast t3 0:gpu>2,3"]


def test_a_host_copy_does_not_expire_while_its_own_node_loads_it() -> None:
    """Read until 8.0. Mutation: counted as unused since the start, and expired at 5.0."""
    world = World("serverlessllm", nodes=1, copies=1, min_replicas=0, host_keep_alive_s=5.0)
    world.at = 4.0
    world.arrive()
    assert world.tick()[1] == "load t1 0 host 0123"
    world.at = 8.0
    world.fail(transfer="t1")
    assert world.tick(8.0)[1] == "load t2 0 host 0123"
