"""A node's compute, one job at a time: the order of messages, hand-overs, failures, and memory that stays bounded."""

from __future__ import annotations

import pytest

from lambdascale.core.commands import Repartition, Serve
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from tests.node.fakes import BLOCKS, FakeCluster, FakeRunner, expected_answer, replica, run_until_tokens, stages

HALVES = stages((0, 0, 1), (1, 2, 3))


# -- placing -------------------------------------------------------------------------------------------------------------


def test_requests_that_come_before_their_instance_wait_for_it() -> None:
    cluster = FakeCluster(1)
    cluster.assign(1, 0, 1, 2)
    cluster.run()
    assert cluster.tokens() == []
    cluster.serve(1, *stages(replica(0)))
    cluster.run()
    cluster.check()
    assert cluster.nodes[0]._early == {}


def test_a_pass_that_comes_before_its_instance_waits_for_it() -> None:
    """The head starts at once, the node of the second stage is told of the instance later."""
    cluster = FakeCluster(2)
    cluster.serve(1, *HALVES)
    cluster.assign(1, 0, 1)
    while choices := [choice for choice in cluster.choices() if choice != ("obey", 1, 0)]:
        cluster.happen(choices[0])
    assert cluster.executors[1].log == []
    cluster.run()
    cluster.check()


def test_messages_of_an_ended_instance_are_dropped() -> None:
    cluster = FakeCluster(1)
    cluster.serve(1, *stages(replica(0)))
    cluster.stop(1, 0)
    cluster.run()
    cluster.nodes[0].take(wire.Assign(1, (Ticket(1, [1], 1, 2),)))
    cluster.nodes[0].take(wire.KvPart(1, 1, 9, 0, 8, b""))
    cluster.nodes[0].repartition(_new_stages(1))
    cluster.nodes[0].step()
    cluster.run()
    assert cluster.tokens() == []
    assert cluster.nodes[0]._early == {}
    assert cluster.nodes[0]._instances == {}


def _new_stages(instance: int) -> wire.NewStages:
    first = Serve(instance, "tiny", stages(replica(0)), (1,) * BLOCKS, 100)
    return wire.NewStages(Repartition(instance, stages(replica(0)), "copy", 100), 1, first, 1)


def test_memory_of_ended_instances_is_bounded() -> None:
    """Nodes live for months: ids of ended instances are forgotten, oldest first."""
    cluster = FakeCluster(1)
    for number in range(1, 3000):
        cluster.nodes[0].stop(number)
    cluster.nodes[0].step()
    assert len(cluster.nodes[0]._ended) == len(cluster.nodes[0]._switching._inbox._stopped) == 1024
    assert 2999 in cluster.nodes[0]._ended
    assert 1 not in cluster.nodes[0]._ended


# -- turns ---------------------------------------------------------------------------------------------------------------


def test_passes_run_before_iterations_start() -> None:
    """A node that is the second stage of one instance and the head of another serves the pipeline first."""
    cluster = FakeCluster(2, places=0)
    cluster.serve(1, *HALVES)
    cluster.serve(2, *stages(replica(1)))
    cluster.run()
    cluster.assign(1, 0, 1)
    while not cluster.wires.get((0, 1)):
        cluster.run(steps=1)
    node = cluster.nodes[1]
    node.take(wire.Assign(2, (Ticket(9, [1, 2], 2, 2),)))
    node.take(cluster.wires[0, 1].popleft())
    node.step()
    assert cluster.executors[1].log == ["run 4-8"]
    node.step()  # starts the iteration
    node.step()  # runs it
    assert cluster.executors[1].log == ["run 4-8", "run 0-8"]


def test_instances_of_a_node_take_turns() -> None:
    cluster = FakeCluster(1)
    for instance in (1, 2):
        cluster.serve(instance, *stages(replica(0)))
    cluster.assign(1, 0, 1)
    cluster.assign(2, 0, 2)
    cluster.nodes[0].occupy(True)
    cluster.run()
    cluster.nodes[0].occupy(False)
    cluster.nodes[0].step()
    cluster.run()
    cluster.check()
    order = [token.request_id for token in cluster.tokens()]
    assert order[:10] in ([1, 2] * 5, [2, 1] * 5)


def test_nothing_runs_while_the_device_is_taken() -> None:
    cluster = FakeCluster(1)
    cluster.serve(1, *stages(replica(0)))
    cluster.assign(1, 0, 1)
    node = cluster.nodes[0]
    node.occupy(True)
    node.occupy(True)
    cluster.run()
    node.occupy(False)
    cluster.run()
    node.step()
    assert cluster.tokens() == []
    node.occupy(False)
    node.step()
    cluster.run()
    cluster.check()


# -- failures ------------------------------------------------------------------------------------------------------------


def test_only_replicas_prepare_ahead_and_only_while_the_device_is_free() -> None:
    """A stage of a pipeline has no spare time: it waits for passes. A replica prepares until nothing is left."""
    cluster = FakeCluster(2)
    cluster.serve(1, *HALVES)
    cluster.serve(2, *stages(replica(0)))
    cluster.run()
    node = cluster.nodes[0]
    half, whole = cluster.executors[0].made
    node.occupy(True)
    node.step()
    assert not node._record_ahead(lambda: False)
    node.occupy(False)
    node.step()
    assert [node._record_ahead(lambda: False) for _ in range(3)] == [True, True, False]
    assert (half.prepared, whole.prepared) == (0, 3)


def test_a_replica_that_does_not_fit_is_named() -> None:
    """The controller hears which instance failed; nothing that comes for it is kept; others go on."""
    cluster = FakeCluster(1)
    cluster.executors[0].too_large.add("tiny")
    cluster.assign(1, 0, 1)
    cluster.serve(1, *stages(replica(0)))
    cluster.run()
    (failure,) = cluster.failures()
    assert failure.instance == 1
    assert "KV slots do not fit" in failure.reason
    assert cluster.nodes[0]._early == {}
    cluster.executors[0].too_large.clear()
    cluster.serve(2, *stages(replica(0)))
    cluster.assign(2, 0, 1)
    cluster.run()
    assert cluster.answers()[1] == expected_answer(cluster.tickets[1])


def test_a_second_stage_that_does_not_fit_leaves_no_runner_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(1)
    executor = cluster.executors[0]
    make = executor.runner

    def only_one(model: str, first_block: int, last_block: int, slots: int) -> FakeRunner:
        if executor.made:
            raise MemoryError
        return make(model, first_block, last_block, slots)

    monkeypatch.setattr(executor, "runner", only_one)
    cluster.serve(1, *stages((0, 0, 1), (0, 2, 3)))
    cluster.run()
    assert [failure.instance for failure in cluster.failures()] == [1]
    assert executor.open == []


def test_an_iteration_that_fails_names_its_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(1)
    cluster.serve(1, *stages(replica(0)))
    cluster.serve(2, *stages(replica(0)))
    cluster.assign(1, 0, 1)
    cluster.run(steps=3)

    def broken(*_: object) -> list[int]:
        raise RuntimeError("the device is out of order")

    monkeypatch.setattr(cluster.executors[0].made[0], "run", broken)
    cluster.run()
    assert [(failure.instance, failure.reason) for failure in cluster.failures()] == [
        (1, "node 0: RuntimeError: the device is out of order")
    ]


def test_a_job_that_raises_is_reported_and_its_future_raises() -> None:
    cluster = FakeCluster(1)
    node = cluster.nodes[0]

    def fail() -> None:
        raise ValueError("no")

    failed, fine = node.post(fail, 7), node.post(lambda: None)
    node.step()
    assert [failure.instance for failure in cluster.failures()] == [7]
    assert fine.result(0) is None
    with pytest.raises(ValueError, match="no"):
        failed.result(0)


def test_the_thread_does_the_same() -> None:
    """Started, the worker runs what is posted, and ends after all of it."""
    cluster = FakeCluster(1)
    node = cluster.nodes[0]
    node.start()
    assert node.post(lambda: None).result(10) is None
    last = [node.post(lambda: None) for _ in range(20)][-1]
    node.close()
    assert last.done()


def test_kv_memory_that_runs_out_costs_time_and_no_token() -> None:
    """Two requests of up to 21 tokens share 25: the later one is prefilled twice."""
    cluster = FakeCluster(1, kv_tokens=25)
    cluster.serve(1, *stages(replica(0)))
    cluster.assign(1, 0, 4, 8)
    cluster.run()
    cluster.check()
    (runner,) = cluster.executors[0].open
    assert runner.prefilled > sum(ticket.prompt_tokens for ticket in cluster.tickets.values())


def test_an_instance_ends_with_its_head() -> None:
    """Nobody else would tell the other nodes of a dissolved pipeline to release their memory."""
    cluster = FakeCluster(2)
    cluster.serve(1, *HALVES)
    cluster.run()
    cluster.nodes[1].lost(0)
    cluster.nodes[1].step()
    assert cluster.executors[1].open == []


# -- aborts --------------------------------------------------------------------------------------------------------------


def test_an_abort_ends_a_request_wherever_it_is() -> None:
    """Waiting, it ends at once; in an iteration under way, with that iteration's token."""
    cluster = FakeCluster(1, max_batch=1)
    cluster.serve(1, *stages(replica(0)))
    cluster.assign(1, 0, 1, 2)
    run_until_tokens(cluster, 1)
    node = cluster.nodes[0]
    node.abort(2)
    node.step()
    assert [m.request_id for m in cluster.said if isinstance(m, wire.Aborted)] == [2]
    while not node._instances[1].head.running:
        node.step()
    node.abort(1)
    cluster.run()
    node.step()
    cluster.run()
    tokens = cluster.tokens()
    assert tokens[-1].finished
    assert len(tokens) < len(expected_answer(cluster.tickets[1]))
    assert {token.request_id for token in tokens} == {1}
