"""Connections lost between nodes that live: state, news, and what is asked of the two ends."""

from __future__ import annotations

import pytest

from lambdascale.live.controller.attention import AttendedTime
from lambdascale.live.controller.mending import PATIENCE_S, Mending

PAIR = frozenset((1, 3))


class Cluster:
    """Notes what the ends are asked to do; directories are numbered from 11 on."""

    def __init__(self, tries: int = 2, silence_s: float = 2 * PATIENCE_S, *, attended: bool = False) -> None:
        self.now, self.asked, self.number = 100.0, list[tuple[str, int, int]](), 10
        clock = AttendedTime(self._time) if attended else self._time
        self.mending = Mending(self._sever, self._announce, clock=clock, tries=tries, silence_s=silence_s)

    def _time(self) -> float:
        return self.now

    def _sever(self, node: int, peer: int) -> None:
        self.asked.append(("sever", node, peer))

    def _announce(self) -> int:
        self.number += 1
        self.asked.append(("announce", self.number, 0))
        return self.number

    def took(self) -> list[tuple[str, int, int]]:
        asked, self.asked = self.asked, []
        return asked


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_both_ends_drop_it_before_one_connects(cluster: Cluster) -> None:
    """The end that has not noticed is told to; the higher id connects, by a new directory."""
    mending = cluster.mending
    assert mending.severed(3, 1)
    assert cluster.took() == [("sever", 1, 3)]
    assert not mending.severed(1, 3)
    assert cluster.took() == [("announce", 11, 0)]
    mending.connected(1, 11)  # the lower id connects to nobody here
    mending.connected(3, 10)  # an answer to an earlier directory
    assert mending.take_mended() == []
    mending.connected(3, 12)  # a later one names all that the eleventh did
    assert mending.take_mended() == [PAIR]
    assert mending.take_mended() == []
    assert not mending.under_way
    cluster.now += 2 * PATIENCE_S
    assert mending.cut_off() == set()


def test_a_new_connection_that_is_lost_before_it_was_reported(cluster: Cluster) -> None:
    """The report of the connection that came second does not count: both ends begin anew."""
    mending = cluster.mending
    for node, peer in ((1, 3), (3, 1), (1, 3)):
        mending.severed(node, peer)
    mending.connected(3, 11)
    assert mending.take_mended() == []
    assert cluster.took() == [("sever", 3, 1), ("announce", 11, 0), ("sever", 3, 1)]
    mending.severed(3, 1)
    mending.connected(3, 12)
    assert mending.take_mended() == [PAIR]


def test_after_some_tries_one_is_given_up(cluster: Cluster) -> None:
    """The one that has lost more; not before a death would be known."""
    mending = cluster.mending
    for _ in range(2):
        mending.severed(1, 3)
        mending.severed(3, 1)
        mending.connected(3, cluster.number)
    assert mending.take_mended() == [PAIR, PAIR]
    cluster.took()
    mending.severed(1, 3)
    mending.severed(2, 1)
    assert cluster.took() == [("sever", 1, 2)]
    assert mending.cut_off() == set()
    cluster.now += 1.0
    assert mending.cut_off() == {1}
    mending.remove(1)
    assert mending.cut_off() == set()


def test_tries_long_ago_do_not_count(cluster: Cluster) -> None:
    mending = cluster.mending
    for _ in range(10):
        mending.severed(1, 3)
        mending.severed(3, 1)
        mending.connected(3, cluster.number)
        cluster.now += 40.0
    assert len(mending.take_mended()) == 10
    assert mending.cut_off() == set()


def test_an_end_that_does_not_answer(cluster: Cluster) -> None:
    """Stopped, say: the connection is not waited for any longer."""
    cluster.mending.severed(1, 3)
    cluster.now += PATIENCE_S
    assert cluster.mending.cut_off() == {3}


def test_a_peer_that_cannot_be_reached_is_tried_again(cluster: Cluster) -> None:
    mending = cluster.mending
    mending.severed(1, 3)
    mending.severed(3, 1)
    mending.unreached(3, 1)
    assert [asked for asked, *_ in cluster.took()] == ["sever", "announce", "announce"]
    mending.unreached(3, 1)
    assert cluster.took() == []
    cluster.now += 1.0
    assert mending.cut_off() == {3}


def test_an_end_that_refuses_since_it_has_not_noticed_is_not_tried_again(cluster: Cluster) -> None:
    """A directory for somebody else made node 3 connect too early. Node 1's report came after the next try, and undid it."""
    mending = cluster.mending
    mending.severed(3, 1)
    assert cluster.took() == [("sever", 1, 3)]
    mending.unreached(3, 1)
    assert cluster.took() == []
    assert not mending.trying
    mending.severed(1, 3)
    assert cluster.took() == [("announce", 11, 0)]
    assert mending.trying
    mending.connected(3, 11)
    assert mending.take_mended() == [PAIR]


def test_patience_grows_with_that_for_silent_nodes() -> None:
    """Connections may take longer where nodes may be silent for minutes."""
    cluster = Cluster(silence_s=120.0)
    cluster.mending.severed(1, 3)
    cluster.now += 59.0
    assert cluster.mending.cut_off() == set()
    cluster.now += 1.0
    assert cluster.mending.cut_off() == {3}


def test_a_pause_of_the_controller_costs_no_node_its_place() -> None:
    """The controller was stopped before it could ask for the new connection; the nodes still have time for it."""
    cluster = Cluster(attended=True)
    cluster.mending.severed(1, 3)
    cluster.now += 25.0
    assert cluster.mending.cut_off() == set()
    for _ in range(2):
        cluster.now += 1.4
        assert cluster.mending.cut_off() == set()
    cluster.now += 0.3
    assert cluster.mending.cut_off() == {3}
