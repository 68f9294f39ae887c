"""Mode switches between compute threads, one message at a time: handovers, KV parts, losses in between."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.core import Failure, Request
from lambdascale.core.commands import Dispatch, KvPolicy, Serve, SwitchMode
from lambdascale.core.events import Event, RequestFinished, TokensProduced
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.controller.answers import Answers
from tests.node.fakes import FakeCluster, FakeRunner, copy, expected_answer, move_to_replicas, replica, run_until_tokens, stages


class Client:
    """A client, and what it got."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.finished = False

    def tokens(self, tokens: Sequence[int], finished: bool) -> None:
        self.got += tokens
        self.finished = finished

    def failed(self, failure: Failure) -> None:
        raise AssertionError(failure)


HALVES = stages((0, 0, 1), (1, 2, 3))


def switched(kv: KvPolicy, moment: int, rng: random.Random | None = None, *, reshape: bool = False) -> FakeCluster:
    """A pipeline over three nodes whose requests go to replicas on the first two, after ``moment`` steps."""
    cluster = FakeCluster(3)
    cluster.serve(1, *stages((0, 0, 0), (1, 1, 2), (2, 3, 3)))
    cluster.assign(1, 0, 1, 2, 3, 4)
    cluster.run(rng, steps=moment)
    if reshape:
        cluster.repartition(1, 1, 0, [0, 1, 2], 3, "copy", *stages((2, 0, 1), (0, 2, 2), (1, 3, 3)))
    move_to_replicas(cluster, kv)
    return cluster


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["copy", "recompute"]), st.integers(0, 80), st.booleans(), st.randoms(use_true_random=False))
def test_a_mode_switch_in_any_order(kv: KvPolicy, moment: int, reshape: bool, rng: random.Random) -> None:
    """A pipeline whose boundaries are just moving may be switched, too. Nothing is left of it."""
    cluster = switched(kv, moment, rng, reshape=reshape)
    cluster.run(rng)
    cluster.check()
    for node in cluster.nodes:
        assert len(node._switching._inbox) == 0
        assert node._early == {}
        assert set(node._instances) <= {2, 3}
    assert [len(executor.open) for executor in cluster.executors] == [1, 1, 0]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["copy", "recompute"]),
    st.sampled_from(["copy", "recompute"]),
    st.integers(0, 80),
    st.integers(0, 20),
    st.randoms(use_true_random=False),
)
def test_a_pipeline_that_is_dissolved_before_its_requests_come(
    first: KvPolicy, second: KvPolicy, moment: int, between: int, rng: random.Random
) -> None:
    """Node 0 leaves, and at once the others' pipeline, too: requests on their way to it go on to its replicas.

    Mutation: the handover is dropped, and its requests wait for ever.
    """
    cluster = FakeCluster(3)
    cluster.serve(1, *stages((0, 0, 0), (1, 1, 2), (2, 3, 3)))
    cluster.assign(1, 0, 1, 2, 3, 4)
    cluster.run(rng, steps=moment)
    done = {token.request_id for token in cluster.tokens() if token.finished}
    cluster.serve(2, *stages(replica(0)))
    cluster.serve(3, *stages((1, 0, 2), (2, 3, 3)))
    left = [number for number in (1, 2, 3, 4) if number not in done]
    cluster.switch(1, 0, [(number, 2 if number == 1 else 3) for number in left], {2: 0, 3: 1}, first)
    if first == "recompute":
        cluster.stop(1, 1, 2)
    cluster.run(rng, steps=between)
    done = {token.request_id for token in cluster.tokens() if token.finished}
    cluster.serve(4, *stages(replica(1)))
    cluster.serve(5, *stages(replica(2)))
    moves = [(number, 4 + number % 2) for number in (2, 3, 4) if number not in done]
    cluster.switch(3, 1, moves, {4: 1, 5: 2}, second)
    if second == "recompute":
        cluster.stop(3, 2)
    cluster.run(rng)
    cluster.check()
    for node in cluster.nodes:
        assert len(node._switching._inbox) == 0
        assert set(node._instances) <= {2, 4, 5}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["copy", "recompute"]), st.integers(0, 60), st.randoms(use_true_random=False))
def test_answers_are_complete_and_in_order_however_late_a_nodes_word_is(kv: KvPolicy, moment: int, rng: random.Random) -> None:
    """Words of different nodes reach the controller in any order: also an answer's end ahead of its first token."""
    cluster = switched(kv, moment)
    cluster.run(rng)
    events: list[Event] = []
    answers = Answers(lambda node, message: None, lambda: range(3), events.append)
    clients = {number: Client() for number in cluster.tickets}
    for instance, shares in ((1, HALVES), (2, stages(replica(0))), (3, stages(replica(1)))):
        answers.serve(Serve(instance, "tiny", shares, (1,) * 4, 100))
    for number, ticket in cluster.tickets.items():
        answers.begin(number, copy(ticket), clients[number])
    answers.dispatch(Dispatch(1, tuple(Request(number, 0.0, "tiny", 1, 1) for number in cluster.tickets)))
    answers.switch_mode(SwitchMode(1, tuple((number, 2 + number % 2) for number in cluster.tickets), kv))
    while speaking := [said for said in cluster.said_by if said]:
        message = rng.choice(speaking).popleft()
        if isinstance(message, wire.Tokens):
            answers.tokens(message)
        elif isinstance(message, wire.Resumed):
            answers.resumed(message)
    assert {number: client.got for number, client in clients.items()} == {
        number: expected_answer(ticket) for number, ticket in cluster.tickets.items()
    }
    assert all(client.finished for client in clients.values())
    kinds = {number: [type(e) for e in events if getattr(e, "request_id", None) == number] for number in clients}
    assert all(kind == [TokensProduced, RequestFinished] for kind in kinds.values()), "one first token, ahead of the end"


def test_kv_goes_along_and_replicas_prefill_nothing() -> None:
    """Each node of the pipeline sends exactly its own layers with "copy", and the replicas go on decoding."""
    cluster = FakeCluster(2)
    cluster.serve(1, *HALVES)
    cluster.assign(1, 0, 1)
    run_until_tokens(cluster, 3)
    cluster.serve(2, *stages(replica(1)))
    cluster.switch(1, 0, [(1, 2)], {2: 1}, "copy")
    sent = cluster.run_noting()
    cluster.check()
    assert [(m.first_layer, m.layers) for m in sent if isinstance(m, wire.KvPart)] == [(0, 4)], "the other half has come already"
    before = sum(len(m.tokens) for m in cluster.said if isinstance(m, wire.Tokens) and m.instance == 1)
    passes = cluster.executors[1].log.count("run 0-8")
    assert before + passes == len(expected_answer(cluster.tickets[1])), "one iteration for each token that was left"


def handover(ticket: Ticket, sources: tuple[int, ...] = (1, 2)) -> wire.Handover:
    return wire.Handover(5, (copy(ticket),), 4, frozenset({ticket.request_id}), sources)


def waiting_replica() -> tuple[FakeCluster, Ticket]:
    """A replica, and a request that comes to it with one token and KV from nodes 1 and 2."""
    cluster = FakeCluster(1)
    cluster.serve(5, *stages(replica(0)))
    cluster.run()
    ticket = Ticket(1, [3, 4, 5], 3, 6)
    cluster.tickets[1] = copy(ticket)
    first = expected_answer(ticket)[0]
    ticket.tokens.append(first)
    cluster.said.append(wire.Tokens(4, "pipeline", (wire.Token(1, 0, first, False),)))
    return cluster, ticket


def kv_part(cluster: FakeCluster, ticket: Ticket, first_layer: int, layers: int) -> wire.KvPart:
    """KV of all tokens but the newest, as a pipeline's node would send it."""
    runner = FakeRunner(range(4), 1, [])
    values = ticket.tokens[:-1]
    for position, token in enumerate(values):
        runner._through(0, position, token)
    data = runner.read_kv(0, len(values), range(first_layer, first_layer + layers))
    return wire.KvPart(5, ticket.request_id, 4, first_layer, layers, data)


def resumed(cluster: FakeCluster) -> list[wire.Resumed]:
    return [message for message in cluster.said if isinstance(message, wire.Resumed)]


def feed(cluster: FakeCluster, *messages: wire.ForInstance) -> None:
    for message in messages:
        cluster.nodes[0].take(message)
        cluster.nodes[0].step()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_kv_may_come_before_its_request(order: tuple[int, ...]) -> None:
    """The request goes on when ticket and all layers are here, and not before."""
    cluster, ticket = waiting_replica()
    messages = [handover(ticket), kv_part(cluster, ticket, 0, 4), kv_part(cluster, ticket, 4, 4)]
    feed(cluster, *(messages[index] for index in order[:2]))
    cluster.run()
    assert len(cluster.tokens()) == 1
    feed(cluster, messages[order[2]])
    cluster.run()
    cluster.check()
    on = [message for message in resumed(cluster) if not message.waiting]
    assert on[-1] == wire.Resumed(5, {1: ()}), "the controller hears that it goes on"
    assert len(cluster.nodes[0]._switching._inbox) == 0
    assert cluster.executors[0].made[0].prefilled == 0


def test_kv_that_comes_too_late_is_dropped() -> None:
    """A source is lost: the request is prefilled; the parts that still come leave nothing behind."""
    cluster, ticket = waiting_replica()
    feed(cluster, handover(ticket), kv_part(cluster, ticket, 0, 4))
    cluster.nodes[0].lost(2)
    cluster.nodes[0].step()
    cluster.run()
    cluster.check()
    feed(cluster, kv_part(cluster, ticket, 4, 4))
    assert len(cluster.nodes[0]._switching._inbox) == 0


def test_kv_that_a_stopped_pipeline_will_not_send_is_not_waited_for() -> None:
    """The pipeline's nodes lost their connection: the second one never heard that it has KV to send.

    Its connection to the replica is whole, so the replica alone would wait for ever. What it says decides when the controller
    takes the switch for done.
    """
    cluster, ticket = waiting_replica()
    feed(cluster, handover(ticket), kv_part(cluster, ticket, 0, 4))
    cluster.run()
    assert len(cluster.tokens()) == 1
    assert resumed(cluster) == [wire.Resumed(5, {1: tuple(ticket.output)}, frozenset({1}))]
    cluster.nodes[0].stop(4)
    cluster.nodes[0].step()
    assert resumed(cluster)[1:] == [wire.Resumed(5, {1: ()})]
    cluster.run()
    cluster.check()
    assert len(cluster.nodes[0]._switching._inbox) == 0


def test_a_handover_after_its_pipeline_was_stopped_waits_for_nothing() -> None:
    cluster, ticket = waiting_replica()
    cluster.nodes[0].stop(4)
    cluster.nodes[0].step()
    feed(cluster, handover(ticket), kv_part(cluster, ticket, 0, 4))
    assert resumed(cluster) == [wire.Resumed(5, {1: tuple(ticket.output)})]
    cluster.run()
    cluster.check()
    assert len(cluster.nodes[0]._switching._inbox) == 0


def test_the_loss_of_another_node_changes_nothing() -> None:
    cluster, ticket = waiting_replica()
    feed(cluster, handover(ticket), kv_part(cluster, ticket, 0, 4))
    cluster.nodes[0].lost(3)
    feed(cluster, kv_part(cluster, ticket, 4, 4))
    cluster.run()
    cluster.check()
    assert cluster.executors[0].made[0].prefilled == 0


def test_a_handover_after_the_loss_of_a_source_waits_for_nothing() -> None:
    cluster, ticket = waiting_replica()
    cluster.nodes[0].lost(2)
    cluster.nodes[0].step()
    feed(cluster, kv_part(cluster, ticket, 0, 4), handover(ticket))
    cluster.run()
    cluster.check()
    assert len(cluster.nodes[0]._switching._inbox) == 0


def test_parts_of_a_pipeline_that_was_stopped_are_dropped() -> None:
    """The head died before it handed over; the controller stops the pipeline and sends the request itself."""
    cluster, ticket = waiting_replica()
    feed(cluster, kv_part(cluster, ticket, 0, 4))
    cluster.nodes[0].stop(4)
    cluster.nodes[0].step()
    feed(cluster, kv_part(cluster, ticket, 4, 4))
    assert len(cluster.nodes[0]._switching._inbox) == 0
    feed(cluster, wire.Assign(5, (copy(ticket),)))
    cluster.run()
    cluster.check()


@pytest.mark.parametrize("with_kv", [True, False])
def test_a_request_that_is_handed_over_twice_is_added_once(with_kv: bool) -> None:
    """The pipeline and the controller hand it over, in either order, with KV on its way or without."""
    for first in (0, 1):
        cluster, ticket = waiting_replica()
        handed = handover(ticket) if with_kv else wire.Handover(5, (copy(ticket),), 4)
        twice: list[wire.ForInstance] = [handed, wire.Assign(5, (copy(ticket),))]
        feed(cluster, twice[first], twice[1 - first])
        feed(cluster, *(kv_part(cluster, ticket, layer, 4) for layer in (0, 4)))
        cluster.run()
        cluster.check()
        assert sum(token.finished for token in cluster.tokens()) == 1
        assert len(cluster.tokens()) == 6
        assert len(cluster.nodes[0]._switching._inbox) == 0


def test_a_replica_that_becomes_a_pipeline_waits_for_no_kv() -> None:
    """KV is put into slots of whole instances only: the request is prefilled on the new stages instead."""
    cluster, ticket = waiting_replica()
    feed(cluster, handover(ticket), kv_part(cluster, ticket, 0, 4))
    cluster.repartition(5, 1, 0, [0], 1, "copy", *stages((0, 0, 1), (0, 2, 3)))
    cluster.run()
    feed(cluster, kv_part(cluster, ticket, 4, 4))
    cluster.run()
    cluster.check()
    assert len(cluster.nodes[0]._switching._inbox) == 0


@pytest.mark.parametrize("kv", ["copy", "recompute"])
def test_kv_that_waits_for_a_slot_is_given_up_when_the_stages_change(kv: KvPolicy) -> None:
    """A request that waits for its turn, with complete KV outside of slots, is prefilled on the new stages."""
    cluster, ticket = waiting_replica()
    cluster.assign(5, 0, 2, 3)
    while len(cluster.nodes[0]._instances[5].head.batches[0].kv_slots()) < 2:
        cluster.run(steps=1)
    feed(cluster, handover(ticket), kv_part(cluster, ticket, 0, 4), kv_part(cluster, ticket, 4, 4))
    assert len(cluster.nodes[0]._switching._inbox) == 1
    cluster.repartition(5, 1, 0, [0], 1, kv, *stages((0, 0, 1), (0, 2, 3)))
    cluster.run()
    cluster.check()
    assert len(cluster.nodes[0]._switching._inbox) == 0


def test_an_abort_ends_a_request_that_waits_for_its_kv() -> None:
    cluster, ticket = waiting_replica()
    feed(cluster, handover(ticket), kv_part(cluster, ticket, 0, 4))
    cluster.nodes[0].abort(1)
    cluster.nodes[0].step()
    feed(cluster, kv_part(cluster, ticket, 4, 4))
    assert [m.request_id for m in cluster.said if isinstance(m, wire.Aborted)] == [1]
    assert len(cluster.nodes[0]._switching._inbox) == 0
