"""Members of a live cluster: silence and deaths."""

from __future__ import annotations

from typing import cast

import pytest

from lambdascale.live.controller.attention import AttendedTime
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import End, Launcher
from lambdascale.live.controller.membership import Membership


class Cluster:
    """Stands in for the hub and the launcher, and for the time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[str] = []
        self.killed: list[int] = []
        self.ended: list[int] = []

    def monotonic(self) -> float:
        return self.now

    def watch(self, descriptors: set[int]) -> None:
        assert not descriptors & {-node for node in self.killed}

    def sentinels(self) -> dict[int, int]:
        return {-node: node for node in range(1, 5) if node not in self.killed}

    def dead(self) -> dict[int, End]:
        return {node: End.of(1) for node in self.ended}

    def kill(self, node: int) -> None:
        self.killed.append(node)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def members(cluster: Cluster) -> Membership:
    members = Membership(cast(Launcher, cluster), cast(Hub, cluster), 3.0, AttendedTime(cluster.monotonic))
    for node in (1, 2, 3, 4):
        members.admit(node)
    return members


def dead(members: Membership, *, ended: bool) -> set[int]:
    return set(members.lost(ended=ended))


def test_a_silent_node_is_taken_for_dead_and_those_heard_of_are_not(cluster: Cluster, members: Membership) -> None:
    for _ in range(3):
        cluster.now += 0.9
        assert dead(members, ended=False) == set()
        assert all(members.hear(node) for node in (1, 2, 4))
    cluster.now += 1.0
    assert dead(members, ended=False) == {3}
    members.remove(3)
    assert cluster.killed == [3]
    assert not members.hear(3)
    assert dead(members, ended=False) == set()


def test_a_pause_of_the_controller_is_no_silence_of_its_nodes(cluster: Cluster, members: Membership) -> None:
    """Members are given their time again; one that ended meanwhile is found at once, and one that stays silent later."""
    assert dead(members, ended=False) == set()
    cluster.ended = [2]
    cluster.now += 25.0
    assert dead(members, ended=True) == {2}
    members.remove(2)
    for _ in range(3):
        cluster.now += 0.9
        assert all(members.hear(node) for node in (1, 4))
        assert dead(members, ended=False) == set()
    cluster.now += 0.9
    assert dead(members, ended=False) == {3}


def test_a_process_that_ended_is_dead_at_once(cluster: Cluster, members: Membership) -> None:
    assert dead(members, ended=False) == set()
    cluster.ended = [4]
    assert dead(members, ended=True) == {4}
