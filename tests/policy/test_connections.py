"""Connections that two living nodes lost and have again: what they shared begins anew, and nobody is to blame."""

from __future__ import annotations

from lambdascale.core.events import ConnectionLost
from tests.policy.test_recovery import multicasting
from tests.policy.world import pipelined, without


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
