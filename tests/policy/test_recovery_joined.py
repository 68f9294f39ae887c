"""Recovery: nodes that joined a tree under way."""

from __future__ import annotations

from tests.policy.world import World, without


def joined() -> World:
    """Node 1 receives t2 from 0 and passes it on to 2 by t3, which joined."""
    world = World("faasnet", nodes=4, target=1)
    world.arrive(2)
    assert without(world.tick(), "timer")[-1] == "multicast t2 0:gpu>1"
    world.arrive(1)
    assert without(world.tick(), "timer")[-1] == "multicast t3 1:gpu>2"
    world.deliver("t2", 1)
    return world


def test_a_node_that_joined_gets_the_rest_from_others_when_its_parent_is_lost() -> None:
    assert joined().lose(1) == ["cancel t2", "cancel t3", "multicast t4 0:gpu>2"]


def test_a_node_that_joined_waits_while_its_parent_gets_the_rest_elsewhere() -> None:
    world = joined()
    given = world.lose(0)
    assert "load t4 1 ssd 123" in given
    assert "cancel t3" not in given


def test_a_node_that_joined_is_fed_otherwise_when_its_parent_is_given_up() -> None:
    """Mutation: the join left waiting for a node that was released."""
    world = joined()
    assert world.fail(transfer="t2") == ["cancel t2", "multicast t4 0:gpu>1"]
    assert world.fail(transfer="t4") == ["cancel t4", "load t5 1 ssd 123"]
    assert world.fail(transfer="t5")[:4] == ["cancel t5", "cancel t3", "release 1", "multicast t6 0:gpu>2"]
