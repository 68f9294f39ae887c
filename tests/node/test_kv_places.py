"""KV written into the memory of requests' new nodes: places that are granted and come back, pipelines that close."""

from __future__ import annotations

import random
from collections import deque

import pytest
import torch

from lambdascale.live import wire
from lambdascale.live.node import kv_places
from lambdascale.live.node.kv_places import KvLanding
from lambdascale.live.node.places import Area
from lambdascale.transport import Endpoint, Handlers, ShmEndpoint, TcpEndpoint
from tests.node import kv_rig
from tests.node.fakes import FakeCluster, FakePlaces, expected_answer, replica, run_until_tokens, stages

HALVES = stages((0, 0, 1), (1, 2, 3))
CPU = torch.device("cpu")


def switching(kv_places: int = 2, requests: tuple[int, ...] = (1, 2)) -> FakeCluster:
    """A pipeline over nodes 0 and 1 that has just been told to hand its requests over to a replica on node 2."""
    cluster = FakeCluster(3, kv_places=kv_places)
    cluster.serve(1, *HALVES)
    cluster.assign(1, 0, *requests)
    run_until_tokens(cluster, 2 * len(requests))
    cluster.serve(2, *stages(replica(2)))
    cluster.switch(1, 0, [(request, 2) for request in requests], {2: 2}, "copy")
    return cluster


def free(cluster: FakeCluster) -> list[int]:
    return [node._switching._kv.landing.free for node in cluster.nodes]


def at_rest(cluster: FakeCluster) -> None:
    """No pipeline waits for anything, and nobody has a place."""
    assert [len(node._switching._kv.sender) for node in cluster.nodes] == [0, 0, 0]
    assert free(cluster) == [cluster.kv_places] * 3
    assert not any(node._switching._kv.landing._asked for node in cluster.nodes)


@pytest.mark.parametrize("kv_places", [1, 2, 5])
def test_kv_goes_to_granted_places_in_parts(kv_places: int) -> None:
    """No KV is in a message, with one place or many, and what is written is what comes out."""
    cluster = switching(kv_places)
    sent = cluster.run_noting()
    cluster.check()
    parts = [message for message in sent if isinstance(message, wire.KvPart)]
    assert {(part.request_id, part.first_layer) for part in parts} >= {(1, 0), (1, 4), (2, 0), (2, 4)}
    assert all(isinstance(part.data, wire.Landed) for part in parts)
    assert sum(isinstance(message, wire.Grant) for message in sent) == len(parts)
    assert cluster.executors[2].made[0].prefilled == 0
    at_rest(cluster)


def test_kv_larger_than_a_place_is_cut_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCluster, "kv_place_bytes", 4 * 8)  # one layer of eight tokens
    cluster = switching()
    parts = [message for message in cluster.run_noting() if isinstance(message, wire.KvPart)]
    cluster.check()
    assert sorted((part.request_id, part.first_layer) for part in parts) == [(r, layer) for r in (1, 2) for layer in range(8)]
    at_rest(cluster)


def test_a_layer_larger_than_a_place_travels_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCluster, "kv_place_bytes", 4)
    cluster = switching()
    parts = [message for message in cluster.run_noting() if isinstance(message, wire.KvPart)]
    cluster.check()
    assert len(parts) == 4
    assert all(isinstance(part.data, bytes) for part in parts)
    at_rest(cluster)


def test_without_places_kv_travels_in_messages() -> None:
    cluster = switching(kv_places=0)
    sent = cluster.run_noting()
    cluster.check()
    parts = [message for message in sent if isinstance(message, wire.KvPart)]
    assert sorted((part.first_layer, part.layers) for part in parts) == [(0, 4), (0, 4), (4, 4), (4, 4)]
    assert all(isinstance(part.data, bytes) for part in parts)
    assert not any(isinstance(m, wire.AskForPlaces | wire.Grant) for m in sent)
    assert cluster.executors[2].made[0].prefilled == 0


def test_a_pipeline_stays_until_its_kv_has_been_sent() -> None:
    """Messages of it are refused from the start; its memory is given back afterwards."""
    cluster = switching(kv_places=1)
    while not len(cluster.nodes[1]._switching._kv.sender):
        cluster.run(steps=1)
    runner = cluster.executors[1].made[0]
    assert not runner.closed
    assert 1 in cluster.nodes[1]._ended
    cluster.run()
    assert runner.closed
    cluster.check()


def test_a_pipeline_that_is_stopped_sends_no_more() -> None:
    """Grants on their way come back; the controller hands the requests over from what it knows."""
    cluster = switching(kv_places=1)
    granted = cluster.wires.setdefault((2, 1), deque())
    while not any(isinstance(message, wire.Grant) for message in granted):
        cluster.run(steps=1)
    cluster.stop(1, 1, 0, 2)
    cluster.obey(1)
    sent = cluster.run_noting()
    cluster.check()
    assert any(isinstance(message, wire.GiveBack) for message in sent)
    at_rest(cluster)
    assert [len(executor.open) for executor in cluster.executors] == [0, 0, 1]


@pytest.mark.parametrize("seed", range(40))
def test_kv_that_cannot_be_read_is_prefilled(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, for lack of memory: the controller hears of it, no request waits for it, and nothing stays behind."""
    rng = random.Random(seed)
    cluster = switching(kv_places=rng.choice((0, 1, 2)))
    runner, reads = cluster.executors[rng.randrange(2)].made[0], rng.randrange(2)
    good = runner.read_kv

    def read_kv(slot: int, tokens: int, layers: range) -> bytes:
        nonlocal reads
        reads -= 1
        if reads < 0:
            raise MemoryError("no memory")
        return good(slot, tokens, layers)

    monkeypatch.setattr(runner, "read_kv", read_kv)
    cluster.run(rng)
    assert {failure.instance for failure in cluster.failures()} == {1}
    assert cluster.answers() == {number: expected_answer(ticket) for number, ticket in cluster.tickets.items()}
    at_rest(cluster)
    assert runner.closed
    assert [len(executor.open) for executor in cluster.executors] == [0, 0, 1]


@pytest.mark.parametrize("seed", range(40))
def test_a_sender_is_lost_at_any_moment(seed: int) -> None:
    """The places it had are free again, and the other sender's KV has somewhere to go."""
    rng = random.Random(seed)
    cluster = switching(kv_places=rng.choice((1, 2)))
    while 2 not in cluster.nodes[2]._instances:
        cluster.run(rng, steps=1)
    while not cluster.nodes[2]._switching._kv.landing._asked and not cluster.nodes[2]._switching._kv.landing._granted:
        cluster.run(rng, steps=1)
    cluster.run(rng, steps=rng.randrange(12))
    lost = rng.choice((0, 1))
    cluster.dead.add(lost)
    for wires in ((lost, 2), (lost, 1 - lost)):
        if rng.random() < 0.5:
            cluster.wires.pop(wires, None)  # on the way when it died
        while cluster.wires.get(wires):
            cluster.deliver(*wires)
    for survivor in (1 - lost, 2):
        cluster.nodes[survivor].lost(lost)
        cluster.nodes[survivor].step()
    cluster.stop(1, 1 - lost, 2)
    cluster.run(rng)
    assert cluster.failures() == []
    assert free(cluster)[2] == cluster.kv_places
    assert len(cluster.nodes[1 - lost]._switching._kv.sender) == 0
    assert len(cluster.nodes[2]._switching._inbox) == 0
    assert len(cluster.executors[1 - lost].open) == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_receiver_is_lost_at_any_moment(seed: int) -> None:
    """Pipelines close, whether they wait for a grant, have one, or have not asked yet."""
    rng = random.Random(seed)
    cluster = switching(kv_places=1)
    cluster.run(rng, steps=rng.randrange(30))
    cluster.dead.add(2)
    for sender in (0, 1):
        while rng.random() < 0.5 and cluster.wires.get((2, sender)):
            cluster.deliver(2, sender)
        cluster.wires.pop((2, sender), None)
        cluster.nodes[sender].lost(2)
        cluster.nodes[sender].step()
    cluster.run(rng)
    assert cluster.failures() == []
    assert [len(node._switching._kv.sender) for node in cluster.nodes[:2]] == [0, 0]
    assert [len(executor.open) for executor in cluster.executors[:2]] == [0, 0]


def landing(places: int = 1) -> tuple[KvLanding, list[tuple[int, wire.Grant]], set[int]]:
    """Places of 4 bytes on node 0, the grants that it sends, and nodes that it finds lost."""
    granted: list[tuple[int, wire.Grant]] = []
    dead: set[int] = set()

    def tell(node: int, message: wire.Peer) -> bool:
        assert isinstance(message, wire.Grant)
        if node not in dead:
            granted.append((node, message))
        return node not in dead

    area = Area(FakePlaces(0, {}, dead), memoryview(bytearray(b"abcdefgh"))[: 4 * places], 100)
    return KvLanding(0, area, 4, tell), granted, dead


def test_places_are_granted_in_turn() -> None:
    """A node with many parts does not keep another waiting."""
    places, granted, _ = landing()
    places.asked(wire.AskForPlaces(7, 1, 3))
    places.asked(wire.AskForPlaces(7, 2, 2))
    while places.free < 1:
        number = granted[-1][1].number
        assert places.take(number, wire.Landed(100, 3)) == b"abc"
    assert [node for node, _ in granted] == [1, 1, 2, 1, 2]
    assert len({grant.number for _, grant in granted}) == 5


def test_a_void_grant_is_not_read() -> None:
    """A part over a connection that was lost meanwhile is dropped: the place may be somebody else's."""
    places, granted, _ = landing()
    places.asked(wire.AskForPlaces(7, 1, 1))
    old = granted[0][1].number
    places.lost(1)
    assert places.free == 1
    assert places.take(old, wire.Landed(100, 3)) is None
    places.asked(wire.AskForPlaces(7, 1, 1))
    new = granted[1][1].number
    assert places.take(old, wire.Landed(100, 3)) is None
    places.given_back(old)
    assert places.free == 0
    assert places.take(new, wire.Landed(101, 3)) is None
    assert places.take(new, wire.Landed(100, 5)) is None
    assert places.take(new, wire.Landed(100, 4)) == b"abcd"
    assert next(landing()[0]._numbers) != next(landing()[0]._numbers), "the next process counts from elsewhere"


def test_a_part_that_cannot_be_copied_out_leaves_its_place_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without room for the copy: one instance fails, and the KV of others still comes."""
    places, granted, _ = landing()
    places.asked(wire.AskForPlaces(7, 1, 1))
    places.asked(wire.AskForPlaces(8, 2, 1))

    def full(memory: object) -> bytes:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as now:
        now.setattr(kv_places, "copy_of", full)
        with pytest.raises(torch.OutOfMemoryError):
            places.take(granted[0][1].number, wire.Landed(100, 3))
    assert [node for node, _ in granted] == [1, 2]
    assert places.take(granted[1][1].number, wire.Landed(100, 3)) == b"abc"


def test_a_node_that_is_lost_gets_no_place() -> None:
    """Requests for places of lost nodes are dropped, whenever the loss is found."""
    places, granted, dead = landing()
    dead.add(1)
    places.asked(wire.AskForPlaces(7, 1, 2))
    places.asked(wire.AskForPlaces(7, 2, 1))
    places.asked(wire.AskForPlaces(7, 3, 1))
    places.lost(3)
    assert [node for node, _ in granted] == [2]
    places.given_back(granted[0][1].number)
    assert [node for node, _ in granted] == [2]
    assert places.free == 1


@pytest.mark.parametrize("kind", [TcpEndpoint, ShmEndpoint])
@pytest.mark.parametrize("places", [1, 3])
def test_over_a_transport(kind: type[TcpEndpoint], places: int) -> None:
    """Real KV memory: every number arrives in its layer, slot and position, to other nodes and to this one."""

    def make(node: int, handlers: Handlers) -> Endpoint:
        return kind(node, handlers, b"k" * 32)

    kv_rig.hand_over(make, [CPU, CPU], (50, 7, 33, 20), places)
