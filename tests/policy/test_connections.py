"""Connections that two living nodes lost and have again: what they shared begins anew, and nobody is to blame."""

from __future__ import annotations

from lambdascale.core.events import ConnectionLost
from tests.policy.test_recovery import multicasting
from tests.policy.world import pipelined


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
