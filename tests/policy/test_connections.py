"""Connections that two living nodes lost and have again: what they shared begins anew, and nobody is to blame."""

from __future__ import annotations

import pytest

from lambdascale.core.events import ConnectionLost
from tests.policy.test_recovery import multicasting
from tests.policy.world import World, pipelined, without


def test_a_lost_connection_of_two_members_of_a_multicast_replans_it() -> None:
    """The new plan starts from what nodes hold by then; the replica that feeds it serves on."""
    world = multicasting()
    world.deliver("t2", 4)
    assert world.play(ConnectionLost(world.at, 0, 2)) == ["cancel t2", "multicast t3 0:gpu>1,2,3"]
    assert world.play(ConnectionLost(world.at, 0, 7)) == [], "one that has no part in it"


def test_a_lost_connection_within_a_pipeline_restarts_its_requests() -> None:
    """Nobody is to blame: no request is failed however often it happens, and its nodes go on receiving, from a new plan."""
    world = pipelined()
    lines = world.play(ConnectionLost(world.at, 2, 3))
    assert lines[:3] == ["cancel t3", "multicast t4 0:gpu,1:gpu>2,3", "stop i3"]
    assert not [line for line in lines if line.startswith("fail")]
    assert [line for line in world.deliver("t4") if line.startswith("dispatch")]


@pytest.mark.parametrize("ends", [(0, 3), (3, 0), (1, 2), (2, 1)])
def test_a_connection_between_nodes_of_different_transfers_is_none_of_theirs(ends: tuple[int, int]) -> None:
    """0 feeds 2 with a, 1 feeds 3 with b. Mutations: a transfer planned anew that has one of the two nodes."""
    world = World(nodes=4, models="ab")
    world.arrive(4, "a")
    world.arrive(4, "b")
    assert [line for line in world.tick() if "multicast" in line] == ["multicast t3 0:gpu>2", "multicast t4 1:gpu>3b"]
    assert without(world.play(ConnectionLost(world.at, *ends)), "timer") == []


@pytest.mark.parametrize("ends", [(0, 3), (3, 0)])
def test_a_pipeline_goes_on_while_its_own_nodes_are_connected(ends: tuple[int, int]) -> None:
    """Node 0 feeds node 3 and serves beside it. Mutations: an instance restarted that has one of the two nodes."""
    world = pipelined()
    lines = without(world.play(ConnectionLost(world.at, *ends)), "timer")
    assert lines == ["cancel t3", "multicast t4 0:gpu,1:gpu>2,3"]


def test_a_complete_node_of_a_pipeline_serves_alone_when_its_connection_is_lost() -> None:
    """Mutation: it holds the whole model and serves nothing."""
    world = pipelined()
    world.deliver("t3", 3)
    assert world.held(2) == {0, 1, 2, 3}
    lines = without(world.play(ConnectionLost(world.at, 2, 3)), "timer")
    assert lines == ["cancel t3", "multicast t4 0:gpu>3", "stop i3", "serve i4 2", "dispatch i4 4,5"]


def test_requests_of_a_pipeline_go_to_free_slots_when_its_connection_is_lost() -> None:
    """Mutation: they wait until something else happens."""
    world = pipelined()
    world.finish(0, 1, 2)  # 8 goes to i1
    lines = without(world.play(ConnectionLost(world.at, 2, 3)), "timer")
    assert lines[2:] == ["stop i3", "dispatch i1 4", "dispatch i2 5"]


def test_a_lost_connection_does_not_count_among_the_failures_of_a_request() -> None:
    """Requests 0 and 2 have failed twice with their replica. Mutation: the lost connection is their third failure."""
    world = pipelined()
    assert [world.fail(instance=instance)[-1] for instance in ("i1", "i4")] == ["dispatch i4 0,2", "dispatch i5 0,2"]
    world.finish(4, 5, 6, 7)
    assert "dispatch i3 0,2" in world.lose(0)
    assert not [line for line in world.play(ConnectionLost(world.at, 2, 3)) if line.startswith("fail")]


def test_a_lost_connection_sets_the_timer() -> None:
    assert World(nodes=2, min_replicas=2).play(ConnectionLost(0.0, 0, 1)) == ["timer 0"]
