"""Failures and the commands that answer them: sources, destinations, last nodes, transfers, instances.

Nodes that return: test_returning.py.
"""

from __future__ import annotations

import pytest

from lambdascale.core import Failure, MulticastPlan
from lambdascale.core.commands import FailRequest, StartMulticast
from lambdascale.core.events import CommandFailed
from tests.policy.world import World, pipelined, without


def multicasting(**settings: object) -> World:
    """Replica i1 on node 0 with requests 0 and 1 feeds t2 to nodes 1, 2 and 3; 2 to 7 wait."""
    world = World(nodes=4, **settings)
    world.arrive(8)
    assert world.tick()[-2] == "multicast t2 0:gpu>1,2,3"
    return world


# -- lost nodes ------------------------------------------------------------------------------------------------------


def test_a_lost_destination_is_left_out_of_the_new_plan() -> None:
    world = multicasting()
    world.deliver("t2", 4)
    held = {node: world.held(node) for node in (1, 3)}
    assert world.lose(2) == ["cancel t2", "multicast t3 0:gpu>1,3"]
    sent = {(send.dst, send.block) for sends in plan_of(world, "t3").rounds for send in sends}
    assert sent == {(node, block) for node in (1, 3) for block in range(4) if block not in held[node]}, "what they lack, once"
    assert world.deliver("t3") == ["serve i2 1", "dispatch i2 2,3", "serve i3 3", "dispatch i3 4,5"]


def plan_of(world: World, transfer: str) -> MulticastPlan:
    command = world.command(transfer)
    assert isinstance(command, StartMulticast)
    return command.plan


def test_survivors_complete_each_other_when_the_source_is_lost() -> None:
    world = multicasting()
    while set().union(*(world.held(node) for node in (1, 2, 3))) != {0, 1, 2, 3}:
        world.deliver("t2", 1)
    assert without(world.lose(0), "timer") == ["cancel t2", "stop i1", "multicast t3 >1,2,3"], "no source but themselves"
    # Nodes serve as they complete; the lost requests are first in line.
    dispatched = [line for line in world.deliver("t3") if line.startswith("dispatch")]
    assert [request for line in dispatched for request in line.split()[2].split(",")] == ["0", "1", "2", "3", "4", "5"]


def test_without_a_holder_of_every_block_each_loads_the_rest_itself() -> None:
    world = multicasting()
    world.deliver("t2", 6)
    held = {node: world.held(node) for node in (1, 2, 3)}
    lines = without(world.lose(0), "timer")
    assert lines[:2] == ["cancel t2", "stop i1"]
    missing = {node: "".join(str(b) for b in range(4) if b not in held[node]) for node in held}
    assert lines[2:] == [f"load t{3 + i} {node} ssd {missing[node]}" for i, node in enumerate((1, 2, 3))]


def test_a_host_copy_feeds_the_new_plan() -> None:
    world = World(nodes=5, copies=1, sources=1)
    world.arrive(4)
    assert world.tick()[:2] == ["allocate 2", "multicast t2 1:gpu>2"]
    world.deliver("t2", 1)
    assert without(world.lose(1), "timer") == ["cancel t2", "stop i1", "multicast t3 0:host>2"]


def test_an_expired_host_copy_does_not_feed_the_new_plan() -> None:
    world = World(nodes=5, copies=1, sources=1, host_keep_alive_s=5.0)
    world.arrive(4)
    world.tick()
    world.deliver("t2", 1)
    world.at = 6.0
    assert without(world.lose(1), "timer") == ["cancel t2", "stop i1", "load t3 2 ssd 123"]


def test_the_last_destination_lost_leaves_nothing_to_plan() -> None:
    world = World(nodes=2)
    world.arrive(4)
    world.tick()
    assert world.lose(1) == ["cancel t2"]
    assert world.arrive() == []
    world.finish(0, 1, 2)
    assert world.finish(3) == [], "node 0 goes on and is idle but for 4"


def test_a_source_that_lost_its_last_destination_is_free_again() -> None:
    world = World(nodes=3, min_replicas=0, keep_alive_s=0.0)
    world.arrive()
    world.tick()
    world.deliver("t1")
    world.arrive(3)
    assert world.tick()[:2] == ["allocate 1", "multicast t2 0:gpu>1"]
    world.lose(1)
    world.arrive(1)
    assert world.tick()[:3] == ["allocate 2", "multicast t3 0:gpu>2", "timer 0.3"]
    world.lose(2)
    world.finish(0, 1, 2, 3, 4)
    assert world.tick() == ["stop i1", "release 0 keep"]


def test_a_node_without_a_model_is_forgotten_with_its_copies() -> None:
    world = World("serverlessllm", nodes=2, copies=2, min_replicas=0)
    assert world.lose(0) == ["timer 0"]
    world.arrive(4)
    assert world.tick()[:2] == ["allocate 1", "load t1 1 host 0123"]


def test_a_node_is_lost_once() -> None:
    world = multicasting()
    world.lose(2)
    assert world.lose(2) == []
    assert world.lose(17) == []


def test_a_lost_load_is_not_made_up_for_but_asked_for_again() -> None:
    world = World(nodes=2, min_replicas=0)
    world.arrive(2)
    assert world.tick()[:2] == ["allocate 0", "load t1 0 ssd 0123"]
    assert world.lose(0) == ["cancel t1"]
    assert world.tick()[:2] == ["allocate 1", "load t2 1 ssd 0123"]


def test_requests_of_a_lost_replica_are_restarted_on_another() -> None:
    world = World(nodes=2, min_replicas=2)
    world.arrive(2)
    assert world.lose(0) == ["stop i1", "dispatch i2 0"]


def test_the_other_nodes_of_a_broken_pipeline_go_on_receiving_and_serve_alone_once_complete() -> None:
    world = pipelined()
    held = world.held(3)
    lines = without(world.lose(2), "timer")
    assert lines == ["cancel t3", "stop i3", "multicast t4 0:gpu,1:gpu>3"]
    assert sorted(send.block for sends in plan_of(world, "t4").rounds for send in sends) == sorted({0, 1, 2, 3} - held)
    assert world.deliver("t4") == ["serve i4 3", "dispatch i4 4,5"]


def test_a_complete_node_of_a_broken_pipeline_serves_alone_at_once() -> None:
    world = pipelined()
    world.deliver("t3", 3)
    assert world.held(2) == {0, 1, 2, 3}
    assert without(world.lose(3), "timer") == ["cancel t3", "stop i3", "serve i4 2", "dispatch i4 4,5"]


@pytest.mark.parametrize("there", [(), (2,), (2, 3)])
def test_a_pending_pipeline_with_a_lost_node_never_forms(there: tuple[int, ...]) -> None:
    """Mutation: a pipeline with a lost node forms where that node held its blocks by then."""
    world = World(nodes=4, min_replicas=2)
    world.arrive(9)
    world.tick()
    world.block(3, *there)
    world.block(2, 0)
    world.lose(3)
    assert world.block(2, 1, 2) == []
    assert world.block(2, 3) == ["serve i3 2", "dispatch i3 4,5"]


def test_only_transfers_of_the_lost_node_are_planned_anew() -> None:
    world = World(nodes=6, gpus=1, models="ab")
    world.arrive(4, "a")
    world.arrive(4, "b")
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t3 0:gpu>2", "allocate 3b", "multicast t4 1:gpu>3b"]
    assert world.lose(3) == ["cancel t4"]
    assert world.deliver("t3") == ["serve i3 2", "dispatch i3 2,3"]


# -- failed transfers ------------------------------------------------------------------------------------------------


def test_a_failed_multicast_is_planned_anew_once_and_then_loaded_and_then_given_up() -> None:
    """Mutation: the retry bound lost."""
    world = multicasting()
    world.deliver("t2", 6)
    missing = {node: "".join(str(b) for b in range(4) if b not in world.held(node)) for node in (1, 2, 3)}
    assert world.fail(transfer="t2") == ["cancel t2", "multicast t3 0:gpu>1,2,3"]
    assert world.fail(transfer="t3") == ["cancel t3", *(f"load t{3 + node} {node} ssd {missing[node]}" for node in (1, 2, 3))]
    assert world.fail(transfer="t5") == ["cancel t5", "release 2"], "a load has no other source"
    assert without(world.deliver("t4"), "dispatch") == ["serve i2 1"], "the others are not concerned"
    assert world.tick()[:2] == ["allocate 2", "multicast t7 0:gpu>2"], "the autoscaler asks again"


def test_a_node_lost_in_a_second_try_is_made_up_for_and_the_bound_stays() -> None:
    world = multicasting()
    world.fail(transfer="t2")
    assert world.lose(3) == ["cancel t3", "multicast t4 0:gpu>1,2"]
    assert without(world.fail(transfer="t4"), "load") == ["cancel t4"]


def test_a_first_try_after_a_lost_node_may_fail_once() -> None:
    world = multicasting()
    assert world.lose(3) == ["cancel t2", "multicast t3 0:gpu>1,2"]
    assert world.fail(transfer="t3") == ["cancel t3", "multicast t4 0:gpu>1,2"]
    assert without(world.fail(transfer="t4"), "load") == ["cancel t4"]


def test_a_failed_multicast_frees_its_source() -> None:
    world = World(nodes=3, min_replicas=0, keep_alive_s=0.0)
    world.arrive()
    world.tick()
    world.deliver("t1")
    world.arrive(3)
    world.tick()
    for transfer in ("t2", "t3", "t4"):
        last = world.fail(transfer=transfer)
    assert last == ["cancel t4", "release 1"]
    world.finish(0, 1, 2, 3)
    assert world.tick() == ["stop i1", "release 0 keep"]


def test_a_node_that_is_given_up_takes_its_part_of_a_pipeline_with_it() -> None:
    world = World(nodes=3, min_replicas=0)
    world.arrive(6)
    world.tick()
    world.block(0, 0)
    world.block(1, 1, 2)
    assert world.block(2, 3) == ["serve i1 0:0-0,1:1-2,2:3-3", "dispatch i1 0,1,2,3,4,5"]
    assert world.fail(transfer="t2") == ["cancel t2", "stop i1", "release 1"]
    assert world.deliver("t1") == ["serve i2 0", "dispatch i2 0,1"]


@pytest.mark.parametrize("failed", ["t2", "t99"])
def test_a_failure_of_a_transfer_that_has_ended_is_ignored(failed: str) -> None:
    world = multicasting()
    world.deliver("t2")
    event = CommandFailed(world.at, "StartMulticast", "late", 99 if failed == "t99" else world.command("t2").transfer_id)
    assert world.play(event) == []


def test_a_failed_host_load_unpins_its_copy() -> None:
    """Mutation: an unpin forgotten. The copy expires after the load failed."""
    world = World("serverlessllm", nodes=1, copies=1, min_replicas=0, host_keep_alive_s=5.0)
    world.arrive()
    assert world.tick()[1] == "load t1 0 host 0123"
    world.fail(transfer="t1")
    assert world.tick(4.0)[1] == "load t2 0 host 0123"
    world.fail(transfer="t2")
    assert world.tick(9.5)[1] == "load t3 0 ssd 0123"


# -- failed instances ------------------------------------------------------------------------------------------------


def test_a_failed_replica_serves_anew_with_its_requests() -> None:
    world = World(nodes=1)
    world.arrive(3)
    assert world.fail(instance="i1") == ["stop i1", "serve i2 0", "dispatch i2 0,1"]


def test_a_failed_pipelines_complete_nodes_serve_alone_and_the_others_once_they_are_complete() -> None:
    world = pipelined()
    world.deliver("t3", 3)
    assert world.fail(instance="i3") == ["stop i3", "serve i4 2", "dispatch i4 4,5"]
    assert world.deliver("t3") == ["serve i5 3", "dispatch i5 6,7"]


def test_a_failure_of_an_instance_that_was_stopped_is_ignored() -> None:
    world = World(nodes=1)
    world.arrive(1)
    world.fail(instance="i1")
    assert world.fail(instance="i1") == []


def test_a_failure_sets_the_timer() -> None:
    world = World(nodes=2, min_replicas=2)
    assert world.fail(instance="i1") == ["stop i1", "serve i3 0", "timer 0"]
    assert World(nodes=2, min_replicas=2).lose(1) == ["stop i2", "timer 0"]


def test_a_failure_that_names_nothing_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="Serve failed, and the failure names neither a transfer nor an instance: broken"):
        World(nodes=1).fail()


THREE_TIMES = Failure("instance_failed", "its instance failed 3 times: broken")
UNFIT = Failure("unfit_nodes", "a fails on every node: broken")


def failures(world: World) -> list[Failure]:
    return [command.failure for command in world.commands if isinstance(command, FailRequest)]


def test_a_request_that_was_on_three_failed_instances_is_failed() -> None:
    """No other request is failed: the others start anew, oldest first."""
    world = World(nodes=4, min_replicas=3)
    world.arrive(1)
    assert without(world.fail(instance="i1"), "timer") == ["stop i1", "serve i4 0", "dispatch i2 0"]
    assert world.fail(instance="i2") == ["stop i2", "serve i5 1", "dispatch i3 0"]
    world.arrive(5)
    assert {world.at_instance[r] for r in (0, 3)} == {world.at_instance[0]}, "1 to 5 fill the three replicas"
    assert world.fail(instance="i3") == ["stop i3", "fail 0", "serve i6 2", "dispatch i6 3"]
    assert failures(world) == [THREE_TIMES]


def test_failures_of_lost_nodes_are_not_the_requests() -> None:
    world = World(nodes=5, min_replicas=5)
    world.arrive(1)
    for instance in ("i1", "i2"):
        world.fail(instance=instance)
    assert world.lose(2) == ["stop i3", "dispatch i4 0"]
    assert world.fail(instance="i4")[:2] == ["stop i4", "fail 0"]


def test_a_finished_request_leaves_no_count_behind() -> None:
    world = World(nodes=3, min_replicas=3)
    world.arrive(1)
    world.fail(instance="i1")
    world.fail(instance="i2")
    world.finish(0)
    assert not world.plane.fleet.failures


def test_a_node_is_given_up_for_a_model_after_three_failures_in_a_row() -> None:
    world = World(nodes=2, models="ab", gpus=2, min_replicas=1, max_replicas=1, target=100)
    for instance, anew in (("i1", "i3"), ("i3", "i4")):
        assert without(world.fail(instance=instance), "timer") == [f"stop {instance}", f"serve {anew} 0"]
    assert world.fail(instance="i4") == ["stop i4", "release 0"]
    assert without(world.tick(), "timer") == ["allocate 1", "load t3 1 ssd 0123"], "the other node, without a copy"
    world.deliver("t3")
    for instance in ("i5", "i6", "i7"):
        last = world.fail(instance=instance)
    assert last == ["stop i7", "release 1"]
    assert world.arrive(1, "a") == ["fail 0"]
    assert failures(world) == [UNFIT]
    assert world.arrive(1, "b") == ["dispatch i2 1"], "only for that model"


def test_an_answer_in_between_makes_a_node_good_again() -> None:
    world = World(nodes=1)
    world.fail(instance="i1")
    world.fail(instance="i2")
    world.arrive()
    world.finish(0)
    assert world.fail(instance="i3") == ["stop i3", "serve i4 0"]
    assert world.fail(instance="i4") == ["stop i4", "serve i5 0"]
    assert without(world.fail(instance="i5"), "timer") == ["stop i5", "release 0"]


def test_what_is_queued_is_failed_when_no_node_is_left_that_could_serve_it() -> None:
    world = World(nodes=1)
    world.arrive(4)
    world.fail(instance="i1")
    world.fail(instance="i2")
    lines = world.fail(instance="i3")
    assert lines == ["stop i3", "fail 1", "fail 0", "release 0", "fail 2", "fail 3"]
    assert failures(world) == [THREE_TIMES] * 2 + [UNFIT] * 2


def test_a_node_that_feeds_a_transfer_is_not_given_up_before_it_ends() -> None:
    world = World(nodes=2)
    world.arrive(3)
    assert world.tick()[:2] == ["allocate 1", "multicast t2 0:gpu>1"]
    for instance in ("i1", "i2", "i3"):
        last = world.fail(instance=instance)
    assert last == ["stop i3", "fail 1", "fail 0", "serve i4 0", "dispatch i4 2"]
    world.deliver("t2")
    world.finish(2)
    assert world.fail(instance="i4") == ["stop i4", "serve i6 0"], "an answer in between"


def test_the_rest_is_loaded_from_a_nodes_own_host_copy_if_it_has_one() -> None:
    world = World("faasnet", nodes=3, copies=1, warm="NoOwnCopies")
    world.arrive(6)
    assert world.tick()[:3] == ["allocate 2", "allocate 0", "multicast t2 1:gpu>2,0"]
    world.deliver("t2", 2)
    lacking = {node: "".join(str(b) for b in range(4) if b not in world.held(node)) for node in (0, 2)}
    world.fail(transfer="t2")
    assert world.fail(transfer="t3") == ["cancel t3", f"load t4 0 host {lacking[0]}", f"load t5 2 ssd {lacking[2]}"]


def test_a_node_that_is_given_up_keeps_its_other_gpus() -> None:
    world = World(nodes=1, gpus=3, models="abc", min_replicas=0)
    world.arrive(1, "a")
    world.tick()
    world.deliver("t1")
    world.arrive(1, "b")
    world.tick()
    assert world.fail(transfer="t2") == ["cancel t2", "release 0b"]
    world.arrive(1, "c")
    assert without(world.tick(), "timer", "load") == ["allocate 0b", "allocate 0c"], "two of three are free"


def test_requests_that_are_given_up_leave_no_count_behind() -> None:
    world = World(nodes=1)
    world.arrive(1)
    world.fail(instance="i1")
    assert world.lose(0)[-1] == "fail 0"
    assert not world.plane.fleet.failures
