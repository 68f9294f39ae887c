"""KV of batches that move to other stages, on its way through places: instances that end, nodes that are lost, KV too large."""

from __future__ import annotations

import random

import pytest

from lambdascale.live import wire
from tests.node.fakes import FakeCluster, run_until_tokens, stages
from tests.node.test_repartition import ALONE, SOURCE_FIRST, Story, at_rest, layer_ranges


def moving() -> FakeCluster:
    """A replica on node 0 whose request has been told to move to nodes 0 and 1; its second half has asked for a place."""
    cluster = FakeCluster(3, kv_places=1)
    story = Story(cluster, ALONE)
    story.assign(1, 2)
    run_until_tokens(cluster, 4)
    story.repartition(SOURCE_FIRST, "copy")
    while not len(cluster.nodes[0]._switching.sender):
        cluster.run(steps=1)
    return cluster


def test_stages_stay_until_their_kv_has_been_sent() -> None:
    cluster = moving()
    old = cluster.executors[0].made[0]
    assert not old.closed
    while len(cluster.nodes[0]._switching.sender):
        assert not old.closed
        cluster.run(steps=1)
    assert old.closed
    cluster.run()
    cluster.check()
    at_rest(cluster)


@pytest.mark.parametrize("place_bytes", [4, 0])
def test_kv_that_no_place_has_room_for_travels_in_messages(monkeypatch: pytest.MonkeyPatch, place_bytes: int) -> None:
    """Places smaller than a layer, and none at all."""
    if place_bytes:
        monkeypatch.setattr(FakeCluster, "kv_place_bytes", place_bytes)
    cluster = FakeCluster(2, kv_places=2 if place_bytes else 0)
    story = Story(cluster, ALONE)
    story.assign(1)
    run_until_tokens(cluster, 2)
    story.repartition(SOURCE_FIRST, "copy")
    sent = cluster.run_noting()
    cluster.check()
    assert [type(part.data) for part in sent if isinstance(part, wire.SlotKv)] == [bytes]
    assert not any(isinstance(message, wire.AskForPlaces) for message in sent)
    at_rest(cluster)


@pytest.mark.parametrize("moment", range(12))
def test_an_instance_that_is_stopped_while_its_kv_moves(moment: int) -> None:
    """Grants on their way come back, and what has been written for it frees its place."""
    cluster = moving()
    cluster.run(steps=moment)
    cluster.stop(1, 1, 0)
    cluster.run(random.Random(moment))
    assert cluster.failures() == []
    assert not any(executor.open for executor in cluster.executors)
    at_rest(cluster)


@pytest.mark.parametrize("moment", range(12))
def test_the_node_that_takes_kv_is_lost(moment: int) -> None:
    """Old stages close once no batch is on them: nothing is owed to a node that is lost."""
    cluster = moving()
    cluster.run(steps=moment)
    cluster.dead.add(1)
    cluster.wires.pop((1, 0), None)
    cluster.nodes[0].lost(1)
    cluster.nodes[0].step()
    assert len(cluster.nodes[0]._switching.sender) == 0
    assert layer_ranges(cluster, 0) == [range(4)]
    cluster.stop(1, 0)
    cluster.run()
    assert cluster.failures() == []
    assert cluster.executors[0].open == []


def test_a_pipeline_is_collected_when_no_kv_is_owed_to_its_own_nodes() -> None:
    """Dissolved while its KV still moves; the node that was to have that is lost."""
    cluster = moving()
    cluster.serve(2, *stages((2, 0, 3)))
    cluster.switch(1, 0, [(1, 2), (2, 2)], {2: 2}, "copy")
    while cluster.orders[0]:
        cluster.obey(0)
    assert 1 in cluster.nodes[0]._instances
    cluster.nodes[0].lost(1)
    cluster.nodes[0].step()
    assert 1 not in cluster.nodes[0]._instances


def test_kv_that_cannot_be_read_fails_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, for lack of memory: the controller hears of it, the place comes back, and a stop leaves nothing."""
    cluster = moving()

    def read_kv(slot: int, tokens: int, layers: range) -> bytes:
        raise MemoryError("no memory")

    monkeypatch.setattr(cluster.executors[0].made[0], "read_kv", read_kv)
    sent = cluster.run_noting()
    assert not any(isinstance(message, wire.NoMoreKv) for message in sent), "that is for dissolved pipelines"
    assert {failure.instance for failure in cluster.failures()} == {1}
    cluster.stop(1, 1, 0)
    cluster.run()
    assert not any(executor.open for executor in cluster.executors)
    at_rest(cluster)
