"""Answers under way: every token once and in order, from the instances that own the request; nothing is kept for ever."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from lambdascale.core import Failure, Request
from lambdascale.core.commands import Dispatch, FailRequest, KvPolicy, Repartition, Serve, StopInstance, SwitchMode
from lambdascale.core.events import CommandFailed, RequestFinished, RequestPreempted, TokensProduced
from lambdascale.core.plan import Stage
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.controller.answers import Answers


@dataclass
class Client:
    """A client, and what it got."""

    got: list[int] = field(default_factory=list)
    finished: bool = False
    failure: Failure | None = None

    def tokens(self, tokens: Any, finished: bool) -> None:
        assert not self.finished
        self.got += tokens
        self.finished = finished

    def failed(self, failure: Failure) -> None:
        self.failure = failure


class Table(Answers):
    """Answers, with what they told nodes and the control plane."""

    def __init__(self, nodes: int = 4) -> None:
        self.told: list[tuple[int, wire.ToAgent]] = []
        self.events: list[Any] = []
        self.alive = set(range(nodes))
        super().__init__(lambda node, message: self.told.append((node, message)), lambda: self.alive, self.events.append)

    def request(self, number: int, instance: int | None = None) -> Client:
        client = Client()
        self.begin(number, Ticket(number, [1, 2, 3], 3, 5), client)
        if instance is not None:
            self.dispatch(Dispatch(instance, (Request(number, 0.0, "m", 3, 5),)))
        return client

    def say(self, instance: int, request: int, *tokens: tuple[int, int], finished: bool = False) -> None:
        """Tokens of an instance: (index, token)."""
        last = len(tokens) - 1
        these = tuple(
            wire.Token(request, index, token, finished and place == last) for place, (index, token) in enumerate(tokens)
        )
        self.tokens(wire.Tokens(instance, "local", these))

    def take(self, kind: type) -> list[tuple[int, Any]]:
        """Return the messages of a kind that nodes got since the last call."""
        found = [(node, message) for node, message in self.told if isinstance(message, kind)]
        self.told.clear()
        return found


def serve(instance: int, *nodes: int) -> Serve:
    return Serve(instance, "m", tuple(Stage(node, place, place) for place, node in enumerate(nodes)), (1,) * len(nodes), 100)


def table(*instances: Serve) -> Table:
    answers = Table()
    for command in instances:
        answers.serve(command)
    return answers


def test_tokens_reach_the_client_once_and_in_order() -> None:
    """A token that comes again, or ahead of one that is missing, is not the next."""
    answers = table(serve(1, 0))
    client = answers.request(7, 1)
    answers.say(1, 7, (0, 10), (1, 11))
    answers.say(1, 7, (0, 99), (1, 99), (3, 13))
    assert client.got == [10, 11]
    answers.say(1, 7, (2, 12), (3, 13), finished=True)
    assert client.got == [10, 11, 12, 13]
    assert client.finished
    assert answers.events == [TokensProduced(0.0, 1, 7, 1, "local"), RequestFinished(0.0, 1, 7, 4)]
    assert not answers.outstanding


def test_preemptions_are_told_of_requests_that_the_instance_owns() -> None:
    answers = table(serve(1, 0))
    answers.request(7, 1)
    answers.tokens(wire.Tokens(1, "local", (), (7, 8)))
    answers.tokens(wire.Tokens(2, "local", (), (7,)))
    assert answers.events == [RequestPreempted(0.0, 1, 7)]


def test_tokens_of_an_instance_that_does_not_own_the_request_do_not_count() -> None:
    answers = table(serve(1, 0), serve(2, 1))
    client = answers.request(7, 1)
    answers.say(2, 7, (0, 10))
    assert client.got == []
    answers.stop(StopInstance(1))
    answers.say(1, 7, (0, 10))
    assert client.got == []
    answers.say(1, 8, (0, 10))
    assert answers.events == []


def test_a_restarted_request_goes_on_where_it_was() -> None:
    answers = table(serve(1, 0), serve(2, 1))
    client = answers.request(7, 1)
    answers.say(1, 7, (0, 10), (1, 11))
    answers.stop(StopInstance(1))
    assert not answers.outstanding
    answers.take(wire.Do)
    answers.dispatch(Dispatch(2, (Request(7, 0.0, "m", 3, 5),)))
    assert answers.take(wire.Assign) == [(1, wire.Assign(2, (Ticket(7, [1, 2, 3, 10, 11], 3, 5),)))]
    answers.say(2, 7, (2, 12), finished=True)
    assert client.got == [10, 11, 12]


def test_an_aborted_request_is_told_to_its_head_and_ends_at_its_next_dispatch() -> None:
    answers = table(serve(1, 0, 1))
    client = answers.request(7, 1)
    answers.abort(7)
    answers.abort(8)
    assert answers.take(wire.Abort) == [(0, wire.Abort(7))]
    answers.say(1, 7, (0, 10))
    assert client.got == []
    answers.stop(StopInstance(1))
    answers.serve(serve(2, 2))
    answers.dispatch(Dispatch(2, (Request(7, 0.0, "m", 3, 5),)))
    assert answers.take(wire.Assign) == []
    assert answers.events[-1] == RequestFinished(0.0, 2, 7, 1)


def test_a_request_given_up_tells_its_client_why() -> None:
    answers = table(serve(1, 0))
    client = answers.request(7, 1)
    answers.fail(FailRequest(7, Failure("no_node", "no node is left")))
    answers.fail(FailRequest(7, Failure("too_large", "again")))
    assert client.failure == Failure("no_node", "no node is left")
    assert not answers.outstanding
    assert answers.sinks == []


# -- mode switches -------------------------------------------------------------------------------------------------------


def switching(kv: KvPolicy = "copy") -> tuple[Table, Client]:
    """Request 7 of pipeline 1 (head on node 0) goes to replica 2 on node 1."""
    answers = table(serve(1, 0, 1), serve(2, 1))
    client = answers.request(7, 1)
    answers.say(1, 7, (0, 10))
    answers.take(wire.Do)
    answers.switch_mode(SwitchMode(1, ((7, 2),), kv))
    return answers, client


@pytest.mark.parametrize("kv", ["copy", "recompute"])
def test_a_switch_is_told_to_the_head(kv: KvPolicy) -> None:
    """The other nodes hear from the head when to forget the pipeline, if KV is to be copied."""
    answers, _ = switching(kv)
    stopped = [node for node, message in answers.told if message == wire.Do(StopInstance(1))]
    assert answers.take(wire.Switch) == [(0, wire.Switch(SwitchMode(1, ((7, 2),), kv), {2: 1}))]
    assert stopped == ([] if kv == "copy" else [1])


def test_tokens_count_from_both_sides_of_a_switch() -> None:
    answers, client = switching()
    answers.say(1, 7, (1, 11))
    answers.say(2, 7, (1, 11), (2, 12))
    assert client.got == [10, 11, 12]


def test_the_pipelines_tokens_come_behind_those_of_the_new_instance() -> None:
    """Nodes keep their order each, not among them: the new instance says itself from where it goes on."""
    answers = table(serve(1, 0, 1), serve(2, 1))
    client = answers.request(7, 1)
    answers.switch_mode(SwitchMode(1, ((7, 2),), "copy"))
    answers.resumed(wire.Resumed(2, {7: (10, 11)}))
    answers.say(2, 7, (2, 12), finished=True)
    answers.say(1, 7, (0, 10), (1, 11))
    assert client.got == [10, 11, 12]
    assert client.finished
    assert answers.events == [TokensProduced(0.0, 2, 7, 1, "pipeline"), RequestFinished(0.0, 2, 7, 3)]


def test_the_pipelines_head_dies_with_its_last_tokens_untold() -> None:
    """The head had handed the request over: the new instance has the tokens, whatever the controller gives it once more."""
    answers, client = switching()
    answers.take(wire.Do)
    answers.alive = {1, 2, 3}
    answers.node_lost(0)
    answers.resumed(wire.Resumed(2, {7: (10, 11, 12)}))
    answers.say(2, 7, (3, 13), finished=True)
    assert client.got == [10, 11, 12, 13]
    assert client.finished


def test_an_instance_that_does_not_own_a_request_brings_no_tokens_of_it() -> None:
    answers, client = switching()
    answers.resumed(wire.Resumed(3, {7: (10, 99)}))
    answers.say(2, 7, (1, 11))
    assert client.got == [10, 11]


@pytest.mark.parametrize("end", ["resumed", "finished", "failed", "stopped", "dispatched"])
def test_a_switch_is_forgotten_with_its_last_request(end: str) -> None:
    """The death of its head means nothing afterwards."""
    answers, _ = switching()
    if end == "resumed":
        answers.resumed(wire.Resumed(2, {7: (), 99: (1,)}))
    elif end == "finished":
        answers.say(1, 7, (1, 11), finished=True)
    elif end == "failed":
        answers.fail(FailRequest(7, Failure("no_node", "given up")))
    elif end == "stopped":
        answers._answers[7].owners.discard(1)
        answers.stop(StopInstance(2))
    else:
        answers.dispatch(Dispatch(2, (Request(7, 0.0, "m", 3, 5),)))
    assert answers._switches == {}
    answers.take(wire.Do)
    answers.node_lost(0)
    assert answers.told == []


def moved_twice() -> tuple[Table, Client]:
    """Request 7 goes from pipeline 1 (head on node 0) to pipeline 2 (node 1), and at once on to replica 3 on node 2."""
    answers = table(serve(1, 0, 1), serve(2, 1, 2), serve(3, 2))
    client = answers.request(7, 1)
    answers.switch_mode(SwitchMode(1, ((7, 2),), "recompute"))
    answers.switch_mode(SwitchMode(2, ((7, 3),), "recompute"))
    answers.take(wire.Do)
    return answers, client


def test_a_request_that_is_moved_on_before_it_arrived_leaves_no_switch_behind() -> None:
    """A switch that kept the number of an ended request ended the control thread when the pipeline's head was lost later."""
    answers, client = moved_twice()
    answers.resumed(wire.Resumed(2, {7: ()}))
    assert set(answers._switches) == {2}, "the second handover is under way"
    answers.say(3, 7, (0, 10), finished=True)
    assert client.got == [10]
    assert answers._switches == {}
    answers.node_lost(0)
    answers.node_lost(1)
    assert not [event for event in answers.events if isinstance(event, CommandFailed)]


def test_the_last_word_ends_all_handovers_of_a_request() -> None:
    answers, _ = moved_twice()
    answers.resumed(wire.Resumed(3, {7: ()}))
    answers.resumed(wire.Resumed(2, {7: ()}))
    assert answers._switches == {}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_request_whose_handover_is_lost_goes_where_it_was_moved_last(lost: int) -> None:
    answers, client = moved_twice()
    answers.alive = {0, 1, 2, 3} - {lost}
    answers.node_lost(lost)
    assert answers.take(wire.Assign) == [(2, wire.Assign(3, (Ticket(7, [1, 2, 3], 3, 5),)))]
    answers.say(3, 7, (0, 10), finished=True)
    assert client.got == [10]
    assert answers._switches == {}


def test_many_switches_leave_nothing() -> None:
    answers = table()
    for number in range(0, 300, 3):
        answers.serve(serve(number, 0, 1))
        answers.serve(serve(number + 1, 1))
        answers.request(number, number)
        answers.switch_mode(SwitchMode(number, ((number, number + 1),), "recompute"))
        answers.resumed(wire.Resumed(number + 1, {number: ()}))
        answers.say(number + 1, number, (0, 1), finished=True)
        answers.stop(StopInstance(number + 1))
    assert answers._switches == answers._answers == answers._instances == {}


def test_the_head_dies_before_it_has_handed_over() -> None:
    """The targets get the requests from the controller, and every node forgets the pipeline."""
    answers, client = switching()
    answers.take(wire.Do)
    answers.alive = {1, 2, 3}
    answers.node_lost(0)
    stopped = [node for node, message in answers.told if message == wire.Do(StopInstance(1))]
    assert stopped == [1, 2, 3]
    assert answers.take(wire.Assign) == [(1, wire.Assign(2, (Ticket(7, [1, 2, 3, 10], 3, 5),)))]
    answers.say(1, 7, (1, 99))
    answers.say(2, 7, (1, 11))
    assert client.got == [10, 11]


def test_a_connection_within_the_pipeline_is_lost_while_a_request_waits_for_its_kv() -> None:
    """The node that has the rest of the KV may not have heard that it is to send it."""
    answers, client = switching()
    answers.resumed(wire.Resumed(2, {7: (10, 11)}, frozenset({7})))
    answers.take(wire.Do)
    answers.connection_lost(0, 1)
    assert {node for node, message in answers.told if message == wire.Do(StopInstance(1))} == answers.alive
    assert answers.take(wire.Assign) == [(1, wire.Assign(2, (Ticket(7, [1, 2, 3, 10, 11], 3, 5),)))]
    answers.say(2, 7, (2, 12), finished=True)
    assert client.got == [10, 11, 12]


def test_a_switch_whose_head_is_dead_already() -> None:
    answers = table(serve(1, 0, 1), serve(2, 1))
    answers.request(7, 1)
    answers.take(wire.Do)
    answers.alive = {1}
    answers.switch_mode(SwitchMode(1, ((7, 2),), "copy"))
    assert [node for node, _ in answers.take(wire.Assign)] == [1]
    assert answers._switches == {}


@pytest.mark.parametrize("heard", ["before", "after"])
@pytest.mark.parametrize("broken", ["failed", "connection", "node"])
def test_a_pipeline_that_has_failed_may_be_dissolved_before_the_control_plane_hears_of_it(heard: str, broken: str) -> None:
    """Requests come from the controller: a head whose start failed has none, and KV of lost messages never completes."""
    answers = table(serve(1, 0, 1), serve(2, 2))
    client = answers.request(7, 1)
    answers.take(wire.Do)
    switch = SwitchMode(1, ((7, 2),), "copy")
    if heard == "after":
        answers.switch_mode(switch)
    if broken == "failed":
        answers.instance_failed(1)
    elif broken == "connection":
        answers.connection_lost(0, 1)
    else:
        answers.alive -= {0}
        answers.node_lost(0)
    if heard == "before":
        answers.switch_mode(switch)
    assert [m for node, m in answers.take(wire.Assign)] == [wire.Assign(2, (Ticket(7, [1, 2, 3], 3, 5),))]
    assert answers._switches == {}
    answers.say(2, 7, (0, 10), finished=True)
    assert client.finished


def test_a_failure_of_another_instance_or_of_none_changes_no_switch() -> None:
    answers, _ = switching()
    answers.take(wire.Do)
    for instance in (-1, 2, 9):
        answers.instance_failed(instance)
    assert answers.told == []
    assert set(answers._switches) == {1}


# -- repartitions --------------------------------------------------------------------------------------------------------


def repartitioned() -> Table:
    """Instance 1 begins on node 0, is shared with node 1, then with node 2, then alone on node 2."""
    answers = table(serve(1, 0))
    answers.take(wire.Do)
    for shares in ([(1, 0, 0), (0, 1, 1)], [(2, 0, 0), (0, 1, 1)], [(2, 0, 1)]):
        answers.repartition(Repartition(1, tuple(Stage(*share) for share in shares), "copy", 100))
    return answers


def test_all_nodes_old_and_new_hear_of_new_stages() -> None:
    answers = repartitioned()
    told = answers.take(wire.NewStages)
    assert [(node, m.version) for node, m in told] == [(0, 1), (1, 1), (0, 2), (1, 2), (2, 2), (0, 3), (1, 3), (2, 3)]
    assert {m.first.instance for _, m in told} == {1}
    assert [m.batches for _, m in told] == [2] * 8, "slots for as many batches as there ever were"


def test_requests_go_to_the_head_wherever_the_stages_are() -> None:
    answers = repartitioned()
    answers.request(7, 1)
    assert [node for node, _ in answers.take(wire.Assign)] == [0]
    answers.stop(StopInstance(1))
    assert [node for node, _ in answers.take(wire.Do)] == [0, 1, 2]


@pytest.mark.parametrize(("node", "fails"), [(0, True), (1, True), (2, False), (3, False)])
def test_an_instance_fails_with_a_node_that_the_control_plane_no_longer_counts(node: int, fails: bool) -> None:
    """The head and former nodes; of a node with stages the control plane knows itself."""
    answers = repartitioned()
    answers.node_lost(node)
    assert [(type(event), event.instance) for event in answers.events] == [(CommandFailed, 1)] * fails
