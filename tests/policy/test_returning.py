"""Nodes that join later or come back, and requests that wait for them."""

from __future__ import annotations

import pytest

from lambdascale.core import Failure, GpuSpec, NodeOverride
from lambdascale.core.commands import FailRequest
from lambdascale.core.events import NodeGivenUp, NodeJoined
from tests.policy.world import World, without


def test_a_node_that_joins_later_is_taken_in() -> None:
    world = World(nodes=2)
    world.arrive(6)
    world.lose(1)
    world.tick()
    assert world.play(NodeJoined(world.at, 1)) == []
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t2 0:gpu>1"]


def test_a_node_that_joins_sets_the_timer() -> None:
    world = World(nodes=2)
    world.lose(1)
    world.tick()
    assert world.play(NodeJoined(0.0, 1)) == ["timer 0"]


def test_a_node_that_comes_back_is_empty_even_if_nobody_noticed_its_loss() -> None:
    world = World("serverlessllm", nodes=2, copies=1)
    assert world.start[:2] == ["place 0", "allocate 0"]
    world.arrive(1)
    lines = world.play(NodeJoined(world.at, 0))
    assert lines == ["stop i1"]
    assert without(world.tick(), "timer") == ["allocate 0", "load t2 0 ssd 0123"], "its copy is lost as well"


def test_a_node_that_comes_back_may_serve_a_model_again_that_failed_on_it() -> None:
    world = World(nodes=1)
    for instance in ("i1", "i2", "i3"):
        last = world.fail(instance=instance)
    assert last[-1] == "release 0"
    assert world.arrive() == ["fail 0"]
    world.play(NodeJoined(world.at, 0))
    assert world.arrive() == []
    assert without(world.tick(), "timer") == ["allocate 0", "load t2 0 ssd 0123"]


# -- requests that wait for a node to return -----------------------------------------------------------------------------


def test_requests_wait_while_the_last_node_is_started_again() -> None:
    world = World(nodes=1)
    world.arrive(2)
    assert world.lose(0, returns=True) == ["stop i1"]
    assert world.arrive() == [], "one that arrives meanwhile waits as well"
    world.tick()
    world.play(NodeJoined(world.at, 0))
    assert without(world.tick(), "timer") == ["allocate 0", "load t2 0 ssd 0123"]
    assert world.deliver("t2") == ["serve i2 0", "dispatch i2 0,1"]
    world.finish(0, 1)
    assert world.at_instance[2] == world.at_instance[1]


def test_requests_fail_once_every_node_is_given_up() -> None:
    world = World(nodes=2)
    world.arrive(2)
    assert world.lose(0, returns=True) == ["stop i1"]
    world.lose(1, returns=True)
    assert world.play(NodeGivenUp(world.at, 1)) == [], "node 0 may still return"
    assert world.play(NodeGivenUp(world.at, 0)) == ["fail 0", "fail 1"]
    assert {c.failure for c in world.commands if isinstance(c, FailRequest)} == {
        Failure("no_node", "no node is left to serve it")
    }
    assert world.arrive() == ["fail 2"]


def test_requests_fail_at_once_if_no_lost_node_returns() -> None:
    world = World(nodes=1)
    world.arrive(2)
    assert world.lose(0) == ["stop i1", "fail 0", "fail 1"]


def test_a_node_that_returned_is_not_waited_for_again() -> None:
    world = World(nodes=1)
    world.lose(0, returns=True)
    world.play(NodeJoined(world.at, 0))
    world.lose(0)
    assert world.arrive() == ["fail 0"]


def test_requests_wait_for_a_node_that_may_do_better_than_those_on_which_the_model_fails() -> None:
    world = World(nodes=2)
    world.lose(1, returns=True)
    world.arrive()
    for instance in ("i1", "i2", "i3"):
        last = world.fail(instance=instance)
    assert last == ["stop i3", "fail 0", "release 0"]
    assert world.arrive() == []
    assert world.play(NodeGivenUp(world.at, 1)) == ["fail 1"]


@pytest.mark.parametrize("returns", [True, False])
def test_only_nodes_that_can_hold_the_model_are_waited_for(returns: bool) -> None:
    tiny = GpuSpec(name="tiny", memory_bytes=1000, hbm_bytes_per_s=1e12, peak_flops=1e14)
    world = World(nodes=2, cluster={"overrides": (NodeOverride(nodes=(1,), gpu=tiny),)})
    world.lose(1, returns=True)
    world.arrive()
    assert world.lose(0, returns=returns) == (["stop i1"] if returns else ["stop i1", "fail 0"])


def test_a_node_that_comes_back_unnoticed_does_not_fail_what_waits() -> None:
    world = World(nodes=1)
    world.arrive(3)
    assert world.play(NodeJoined(world.at, 0)) == ["stop i1"]
    assert without(world.tick(), "timer") == ["allocate 0", "load t2 0 ssd 0123"]
