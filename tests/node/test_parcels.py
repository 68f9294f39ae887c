"""Hidden states written into the next stage's memory: who may write where, and until when."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lambdascale.live import wire
from tests.node.fakes import PAGE, FakeCluster, Placed, stages

HALVES = stages((0, 0, 1), (1, 2, 3))
THIRDS = stages((0, 0, 1), (1, 2, 2), (2, 3, 3))


def pipeline(*shares: object, nodes: int = 2, places: int = 3) -> FakeCluster:
    """A cluster whose instance 1 has these stages, at rest."""
    cluster = FakeCluster(nodes, places=places)
    cluster.serve(1, *shares)  # type: ignore[arg-type]  # literals and stages are joined at run time
    cluster.run()
    return cluster


def free(cluster: FakeCluster, node: int) -> int:
    """Pages of a node's area that no place has."""
    parcels = cluster.nodes[node]._parcels
    assert parcels is not None
    return parcels.free_bytes // PAGE


def deliver_all(cluster: FakeCluster, src: int, dst: int) -> None:
    while cluster.wires.get((src, dst)):
        cluster.deliver(src, dst)


def test_hidden_states_go_where_they_are_read() -> None:
    """No hidden states travel in a message when offers come before the first iteration."""
    cluster = pipeline(*THIRDS, nodes=3)
    cluster.assign(1, 0, 1, 2, 3, 4)
    sent = cluster.run_noting()
    cluster.check()
    forwards = [message for message in sent if isinstance(message, wire.Forward)]
    assert forwards
    assert all(isinstance(message.inputs, wire.Landed) for message in forwards)
    assert cluster.landed() == len(forwards) == sum(isinstance(message, Placed) for message in sent)


def test_offers_that_come_while_the_first_stage_runs_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: offers wait until the stage has run and been sent, and the first iteration's hidden states go in a message."""
    cluster = FakeCluster(2)
    cluster.serve(1, *HALVES)
    cluster.obey(0)
    (first,) = cluster.executors[0].made
    run = first.run

    def meanwhile(*work: Any) -> Any:
        cluster.obey(1)
        deliver = cluster.wires[1, 0]
        while deliver:
            message = deliver.popleft()
            assert isinstance(message, wire.Offer)
            cluster.nodes[0].take(message)
        return run(*work)

    monkeypatch.setattr(first, "run", meanwhile)
    cluster.assign(1, 0, 1)
    cluster.obey(0)
    cluster.nodes[0].step()
    monkeypatch.undo()
    forwards = [message for message in cluster.run_noting() if isinstance(message, wire.Forward)]
    cluster.check()
    assert all(isinstance(message.inputs, wire.Landed) for message in forwards)


@pytest.mark.parametrize("places", [0, 1, 2])
def test_without_room_they_travel_in_messages(places: int) -> None:
    """A batch without a place is served all the same."""
    cluster = pipeline(*HALVES, places=places)
    cluster.assign(1, 0, 1, 2, 3, 4)
    forwards = [message for message in cluster.run_noting() if isinstance(message, wire.Forward)]
    cluster.check()
    landed = {message.batch for message in forwards if isinstance(message.inputs, wire.Landed)}
    assert landed == set(range(places))
    assert {message.batch for message in forwards} == {0, 1}


def test_an_iteration_larger_than_a_place_travels_in_a_message() -> None:
    cluster = pipeline(*HALVES)
    parcels = cluster.nodes[0]._parcels
    assert parcels is not None
    assert parcels.send(1, 1, 0, bytes(32)) == wire.Landed(PAGE, 32)
    assert parcels.send(1, 1, 0, bytes(33)) == bytes(33)


def test_an_offer_that_comes_before_the_instance() -> None:
    cluster = FakeCluster(2)
    cluster.serve(1, *HALVES)
    cluster.obey(1)
    deliver_all(cluster, 1, 0)
    cluster.obey(0)
    cluster.assign(1, 0, 1)
    cluster.run()
    cluster.check()
    assert cluster.landed() > 0


@pytest.mark.parametrize("started", [False, True])
def test_an_offer_that_comes_after_the_end(started: bool) -> None:
    """The place comes back, whether the instance had started here or not."""
    cluster = FakeCluster(2)
    cluster.serve(1, *HALVES)
    cluster.obey(1)
    if started:
        cluster.obey(0)
    else:
        cluster.orders[0].clear()
        deliver_all(cluster, 1, 0)
    cluster.stop(1, 0, 1)
    cluster.run()
    assert free(cluster, 1) == 3


def test_a_place_waits_for_its_writer() -> None:
    """The node that reads has stopped; the one that writes has not heard of it."""
    cluster = pipeline(*HALVES)
    cluster.stop(1, 1)
    cluster.run()
    assert free(cluster, 1) == 1
    cluster.stop(1, 0)
    cluster.run()
    assert free(cluster, 1) == 3


def test_a_place_waits_for_its_reader() -> None:
    """The node that writes has stopped; the one that reads may still have a pass to run."""
    cluster = pipeline(*HALVES)
    cluster.stop(1, 0)
    cluster.run()
    assert free(cluster, 1) == 1
    cluster.stop(1, 1)
    cluster.run()
    assert free(cluster, 1) == 3


def test_a_lost_writer() -> None:
    cluster = pipeline(*THIRDS, nodes=3)
    assert (free(cluster, 1), free(cluster, 2)) == (0, 0)
    cluster.nodes[2].lost(1)
    cluster.nodes[2].step()
    assert free(cluster, 2) == 0, "its own stage may read until the controller stops the instance"
    cluster.stop(1, 2)
    cluster.run()
    assert free(cluster, 2) == 3


def test_nothing_is_offered_to_a_lost_writer() -> None:
    """The controller has not heard of the loss yet: nobody would vacate the places."""
    cluster = FakeCluster(2)
    cluster.dead.add(0)
    cluster.nodes[1].lost(0)
    cluster.serve(1, *HALVES)
    cluster.stop(1, 1)
    cluster.obey(1)
    assert free(cluster, 1) == 3
    cluster.obey(1)
    assert free(cluster, 1) == 3


def test_offers_of_a_lost_reader_are_void() -> None:
    """The offers came before the instance; by the time it starts, the places belong to nobody."""
    cluster = FakeCluster(2)
    cluster.serve(1, *HALVES)
    cluster.obey(1)
    deliver_all(cluster, 1, 0)
    cluster.nodes[0].lost(1)
    cluster.obey(0)
    parcels = cluster.nodes[0]._parcels
    assert parcels is not None
    assert parcels.send(1, 1, 0, b"abcd") == b"abcd"


def test_hidden_states_of_a_gpu_come_to_the_host_where_places_are() -> None:
    """Sockets and shared memory take host memory only."""

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)  # type: ignore[assignment]  # a tensor that says so

        def cpu(self, *arguments: object, **options: object) -> torch.Tensor:
            return torch.tensor(list(b"host"), dtype=torch.uint8)

    cluster = pipeline(*HALVES)
    parcels = cluster.nodes[0]._parcels
    assert parcels is not None
    hidden = torch.zeros(4, dtype=torch.uint8).as_subclass(OnGpu)
    assert parcels.send(1, 1, 0, hidden) == wire.Landed(PAGE, 4)
    assert cluster.wires[0, 1].pop() == Placed(b"host", PAGE)


def test_nothing_is_placed_at_a_lost_reader() -> None:
    cluster = pipeline(*HALVES)
    cluster.nodes[0].lost(1)
    cluster.nodes[0].step()
    parcels = cluster.nodes[0]._parcels
    assert parcels is not None
    assert parcels.send(1, 1, 0, b"abcd") == b"abcd"


@pytest.mark.parametrize("seed", range(40))
def test_places_come_back_whatever_happens_first(seed: int) -> None:
    """Stages move between nodes and the instance ends while requests are served; all places are free afterwards."""
    rng = random.Random(seed)
    cluster = FakeCluster(3, places=rng.choice((1, 3, 9)))
    rooms = [free(cluster, node) for node in range(3)]
    cluster.serve(1, *HALVES)
    cluster.assign(1, 0, 1, 2, 3, 4)
    cluster.run(rng, steps=rng.randrange(60))
    kv = rng.choice(("copy", "recompute"))
    cluster.repartition(1, 1, 0, [0, 1, 2], 3, kv, *THIRDS)  # type: ignore[arg-type]  # literals and stages are joined at run time
    cluster.run(rng, steps=rng.randrange(60))
    last = rng.choice((stages((0, 0, 3)), stages((2, 0, 0), (0, 1, 3)), HALVES))
    cluster.repartition(1, 2, 0, [0, 1, 2], 3, kv, *last)  # type: ignore[arg-type]  # literals and stages are joined at run time
    if rng.random() < 0.5:
        cluster.run(rng)
        cluster.check()
        if len(last) == 1:
            assert [free(cluster, node) for node in range(3)] == rooms, "a replica needs no places"
    else:
        cluster.run(rng, steps=rng.randrange(60))
    cluster.stop(1, 0, 1, 2)
    cluster.run(rng)
    assert cluster.failures() == []
    assert [free(cluster, node) for node in range(3)] == rooms
    assert not any(node._parcels._places or node._parcels._offered for node in cluster.nodes)  # type: ignore[union-attr]  # fakes have parcels
