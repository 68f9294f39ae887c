"""Requests to instances: every sentence of the router's docstrings as fleet state, event and commands."""

from __future__ import annotations

import pytest

from lambdascale.core.commands import FailRequest, Serve
from lambdascale.core.events import NodeGivenUp, NodeJoined, TokensProduced
from lambdascale.testing.systems import small_cluster, with_kv_tokens
from tests.policy.world import World, pipelined, without


def test_a_request_goes_to_a_free_slot_at_once_and_waits_for_one_otherwise() -> None:
    world = World(nodes=1)
    assert world.arrive(2) == ["dispatch i1 0", "timer 0", "dispatch i1 1"]
    assert world.arrive(3) == [], "an instance never gets more requests than its batch has slots"
    assert world.finish(1) == ["dispatch i1 2"], "first come, first served"
    assert world.finish(0, 2) == ["dispatch i1 3", "dispatch i1 4"]


def test_the_least_loaded_instance_takes_the_request_and_the_older_one_in_a_tie() -> None:
    world = World(nodes=3, min_replicas=3)
    assert world.arrive(4) == ["dispatch i1 0", "timer 0", "dispatch i2 1", "dispatch i3 2", "dispatch i1 3"]
    world.finish(1)
    assert world.arrive(1) == ["dispatch i2 4"]


def test_load_is_relative_to_capacity() -> None:
    """A pipeline of two nodes with two requests is as loaded as a replica with one."""
    world = pipelined()
    world.finish(0, 4, 5, 6)  # 8 goes to i1
    assert world.at_instance[8] == world.at_instance[0]
    world.finish(2)
    assert world.arrive(4) == ["dispatch i3 9", "dispatch i1 10", "dispatch i3 11", "dispatch i3 12"]


def test_new_capacity_takes_over_the_queue_at_once_in_one_dispatch() -> None:
    world = World(nodes=2)
    world.arrive(6)
    world.tick()
    assert world.deliver("t2") == ["serve i2 1", "dispatch i2 2,3"]


def test_one_queue_per_model() -> None:
    world = World(nodes=2, models="ab")
    assert world.start == [
        *["allocate 0", "load t1 0 instant 0123", "allocate 1b", "load t2 1b instant 0123"],
        *["serve i1 0", "serve i2 1b"],
    ]
    world.arrive(4, "a")
    assert world.arrive(2, "b") == ["dispatch i2 4", "dispatch i2 5"]
    assert world.finish(4) == []
    assert world.finish(0) == ["dispatch i1 2"]


@pytest.mark.parametrize(("prompt", "output", "refused"), [(79_000, 345, False), (79_000, 346, True), (345, 79_001, True)])
def test_a_request_whose_cache_never_fits_is_refused(prompt: int, output: int, refused: bool) -> None:
    """2.6 GB beside the weights at 32 KiB a token: 79,345 tokens, prompt and answer together."""
    world = World(nodes=1)
    assert world.arrive(prompt=prompt, output=output)[0] == ("fail 0" if refused else "dispatch i1 0")
    assert world.arrive()[0] == f"dispatch i1 {1}"
    if refused:
        (reason,) = [command.failure.text for command in world.commands if isinstance(command, FailRequest)]
        needed = f"{prompt + output} tokens of KV cache ({prompt} for its prompt, {output} for its answer)"
        assert reason == f"needs up to {needed}, a replica of a has 79345"


def test_without_a_node_requests_are_refused_and_the_queue_is_given_up() -> None:
    world = World(nodes=2)
    world.arrive(4)
    assert world.lose(1) == []
    assert world.lose(0) == ["stop i1", "fail 0", "fail 1", "fail 2", "fail 3"]
    assert world.arrive()[0] == "fail 4"


def test_a_refused_request_is_not_queued() -> None:
    """Mutation: it waits all the same, and gets an answer after its failure."""
    world = World(nodes=1)
    world.lose(0)
    assert world.arrive()[0] == "fail 0"
    world.play(NodeJoined(world.at, 0))
    world.tick()
    assert world.deliver("t2") == ["serve i2 0"]


def test_requests_of_a_lost_instance_go_to_the_head_of_the_queue_oldest_first() -> None:
    world = World(nodes=2, min_replicas=2)
    world.arrive(6)  # 0 and 2 on i1, 1 and 3 on i2, 4 and 5 wait
    assert world.lose(0) == ["stop i1"]
    assert world.finish(1) == ["dispatch i2 0"], "before 4, which came later"
    # i2 got 3 before 0; on the new instance they are in the order in which they arrived.
    assert world.fail(instance="i2") == ["stop i2", "serve i3 1", "dispatch i3 0,3"]
    assert world.finish(3, 0) == ["dispatch i3 2", "dispatch i3 4"]


def test_an_answer_of_a_request_that_was_restarted_is_ignored() -> None:
    world = World(nodes=2, min_replicas=2)
    world.arrive(4)
    stale = dict(world.at_instance)
    world.lose(0)
    world.finish(1, 3)
    assert {r: world.at_instance[r] for r in (0, 2)} != {r: stale[r] for r in (0, 2)}
    assert world.stale(stale[0], 0) == []
    assert world.stale(10_000, 2) == [], "nor one of an instance nobody knows"
    assert world.arrive(1) == [], "no slot was freed by it"


def test_late_news_of_a_request_changes_nothing() -> None:
    """Tokens from a stopped instance, and a second end from a serving one. Mutations: either raises an error."""
    world = World(nodes=2, min_replicas=2)
    world.arrive(3)
    gone, goes_on = world.at_instance[0], world.at_instance[1]
    assert world.lose(0) == ["stop i1", "dispatch i2 0"]
    assert world.play(TokensProduced(world.at, gone, 0, 1, "local")) == []
    assert world.finish(1) == ["dispatch i2 2"]
    assert world.stale(goes_on, 1) == [], "told twice"
    assert world.finish(0, 2) == []


def test_a_request_that_waits_again_may_end_under_the_name_of_the_pipeline_it_was_moved_from() -> None:
    """The word of it came late, when the replica that it was moved to was lost. Mutation: it is sent to another instance."""
    world = pipelined()
    pipeline = world.at_instance[4]
    world.deliver("t3")
    assert world.lose(2)[0] == "stop i4"
    assert [request.request_id for request in world.plane.fleet.models["a"].queue] == [4, 6, 8]
    assert world.finish_at(pipeline, 4) == []
    assert world.finish(0) == ["dispatch i1 6"]
    assert world.finish_at(world.at_instance[6], 6) == ["dispatch i1 8"]


def test_an_end_of_the_head_of_the_queue_lets_the_next_one_go() -> None:
    """The head fits no node that is left but for the one that returns. Mutation: the next one waits beside free slots."""
    world = mixed((0,), nodes=2, min_replicas=2)
    assert world.arrive(prompt=290, output=11)[0] == "dispatch i2 0"
    gone = world.at_instance[0]
    assert world.lose(1, returns=True) == ["stop i2"]
    assert world.arrive(1) == []
    assert world.finish_at(gone, 0) == ["dispatch i1 1"]


def test_a_request_that_a_mode_switch_moved_may_end_under_the_pipelines_name() -> None:
    world = pipelined()
    pipeline = world.at_instance[4]
    assert world.deliver("t3")[-1:] == ["switch i3 4>i4,5>i5,6>i4,7>i5 recompute"]
    assert world.finish_at(pipeline, 4) == ["dispatch i4 8"]
    assert world.stale(pipeline, 4) == [], "once"


def test_a_moved_request_that_is_restarted_is_not_where_the_switch_put_it() -> None:
    world = pipelined()
    pipeline = world.at_instance[4]
    world.deliver("t3")
    assert world.lose(2)[0] == "stop i4"
    assert world.finish(0) == ["dispatch i1 4"], "ahead of 8"
    assert world.stale(pipeline, 4) == [], "the pipeline's last word on it came too late"
    assert world.finish(4) == ["dispatch i1 6"]


def test_a_moved_request_that_is_restarted_ends_where_it_is_now() -> None:
    world = pipelined()
    world.deliver("t3")
    world.lose(2)
    world.finish(0)
    assert world.finish(4) == ["dispatch i1 6"], "on i1, not on the replica that the switch moved it to"


def test_requests_that_wait_again_no_longer_run() -> None:
    """Two of six: four run and two wait, three replicas are wanted. Mutation: the two counted twice, and two nodes taken."""
    world = World(nodes=5, min_replicas=3)
    world.arrive(6)
    world.lose(0)
    assert without(world.tick(), "timer") == ["allocate 3", "multicast t4 1:gpu>3"]


# -- nodes with different KV memory --------------------------------------------------------------------------------------


def mixed(small: tuple[int, ...], *, nodes: int = 3, **settings: object) -> World:
    """Nodes of which ``small`` have room for 300 tokens of KV, the others for 79,345."""
    return World(nodes=nodes, cluster={"overrides": with_kv_tokens(small_cluster(), 300, small).overrides}, **settings)


def test_a_request_goes_where_the_memory_that_it_may_need_is() -> None:
    world = mixed((0,), min_replicas=2)
    assert world.arrive(prompt=290, output=10)[0] == "dispatch i1 0", "an instance has the memory of its own node"
    assert world.arrive(prompt=290, output=11)[0] == "dispatch i2 1"
    assert world.arrive(prompt=290, output=11)[0] == "dispatch i2 2"
    assert world.arrive(prompt=290, output=11) == [], "i1 has a free slot and too little memory"
    assert world.arrive(prompt=10, output=10) == [], "first come, first served"
    assert world.finish(0) == []
    assert world.finish(1) == ["dispatch i2 3", "dispatch i1 4"]


def test_only_what_fits_no_node_is_refused() -> None:
    world = mixed((0, 1), min_replicas=1)
    assert world.arrive(prompt=79_000, output=346)[0] == "fail 0"
    assert without(world.arrive(prompt=79_000, output=345), "timer") == [], "it waits for node 2"
    assert world.lose(2) == ["fail 1"]
    assert world.arrive(prompt=290, output=11)[0] == "fail 2"
    assert world.arrive(prompt=290, output=10)[0] == "dispatch i1 3"
    failures = [command.failure for command in world.commands if isinstance(command, FailRequest)]
    assert [failure.text.rsplit(" ", 1)[1] for failure in failures] == ["79345", "300", "300"]
    assert {failure.reason for failure in failures} == {"too_large"}


def test_what_fits_a_living_node_exactly_is_not_given_up() -> None:
    """Mutation: a request that needs all of a node's KV memory counted as too large for it."""
    world = mixed((0,), nodes=2, min_replicas=2)
    world.arrive(4)
    world.arrive(prompt=290, output=10)
    world.arrive(prompt=290, output=11)
    assert world.lose(1) == ["stop i2", "fail 5"]
    world.finish(0, 2, 1)
    assert world.at_instance[4] == world.at_instance[3] == world.at_instance[0], "on node 0"


def test_a_request_that_fits_no_replica_gets_a_node_that_it_fits() -> None:
    """One replica would do for one request, so that another is added once the first is idle, and that one is surplus then."""
    world = mixed((0, 1), min_replicas=1)
    world.arrive(prompt=10, output=10)
    assert world.arrive(prompt=290, output=11) == []
    assert without(world.tick(), "timer") == [], "one replica is wanted for two requests, and it is busy"
    world.finish(0)
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t2 0:gpu>2"]
    assert without(world.tick(), "timer") == [], "it is on its way"
    assert world.deliver("t2")[-2:] == ["serve i2 2", "dispatch i2 1"]
    assert without(world.tick(world.at + 2), "timer") == ["stop i1", "release 0 keep"]


@pytest.mark.parametrize(("prompt", "output"), [(290, 11), (79_000, 345)])
def test_a_request_waits_for_the_node_that_it_fits_if_the_model_has_one(prompt: int, output: int) -> None:
    """Mutations: another node taken because an idle replica has less memory; one whose memory is just enough not counted."""
    world = mixed((0, 1), nodes=4, min_replicas=1, max_batch=1)
    world.arrive(prompt=prompt, output=output)
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t2 0:gpu>2"]
    assert world.deliver("t2") == ["serve i2 2", "dispatch i2 0"]
    world.arrive(prompt=prompt, output=output)
    assert without(world.tick(), "timer") == [], "i1 is idle, and request 1 waits for i2"
    assert world.finish(0) == ["dispatch i2 1"]


def test_one_idle_replica_is_to_spare_whatever_the_others_do() -> None:
    """Mutation: a node with more memory taken only once all replicas are idle."""
    world = mixed((0, 1), min_replicas=2)
    world.arrive(1)
    assert world.arrive(prompt=290, output=11) == []
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t3 0:gpu>2"]


def test_a_fixed_number_goes_to_where_the_queue_fits_and_is_the_same_again() -> None:
    """Mutations: looks end when the head of the queue fits, although a later request does not, and waits for ever; looks end when
    that one runs, so that two replicas stay.
    """
    world = mixed((0,), nodes=2, min_replicas=1, max_replicas=1, keep_alive_s=0.0)
    world.arrive(3)
    assert world.arrive(prompt=290, output=11) == []
    assert without(world.tick(), "timer") == [], "2 is the head, and fits"
    world.finish(0, 1)
    assert without(world.tick(), "timer") == [], "node 0 is busy with 2"
    world.finish(2)
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t2 0:gpu>1"]
    assert world.deliver("t2") == ["serve i2 1", "dispatch i2 3"]
    assert world.tick() == ["stop i1", "release 0 keep"], "one replica: nothing to look for"


def test_replicas_that_are_wanted_anyway_are_started_where_the_queue_fits() -> None:
    world = mixed((0, 1, 2), nodes=4, min_replicas=1)
    world.arrive(2)
    world.arrive(1, prompt=290, output=11)
    assert without(world.tick(), "timer") == ["allocate 3", "multicast t2 0:gpu>3"]


def test_a_pipeline_has_the_least_memory_of_its_nodes() -> None:
    world = mixed((3,), nodes=4, min_replicas=2)
    world.arrive(9)
    world.tick()
    world.deliver("t3", 4)
    assert [command.kv_tokens for command in world.commands if isinstance(command, Serve)] == [79_345, 79_345, 300]


@pytest.mark.parametrize(("prompt", "output"), [(290, 11), (79_000, 345)])
def test_idle_replicas_of_other_models_make_room_on_the_nodes_that_the_queue_fits(prompt: int, output: int) -> None:
    """Mutation: a node passed over whose memory is exactly as large as needed."""
    world = mixed((0,), nodes=2, models="ab", min_replicas=0, keep_alive_s=100.0)
    for model, node in (("a", 0), ("b", 1)):
        world.arrive(model=model)
        assert f"allocate {node}{'' if model == 'a' else model}" in world.tick()
        world.deliver(world.open_transfers()[0])
    world.finish(0, 1)
    world.arrive(prompt=prompt, output=output)
    assert without(world.tick(), "timer")[:3] == ["stop i2", "release 1b keep", "allocate 1"]


def test_a_node_that_will_be_started_again_counts_with_its_memory() -> None:
    world = mixed((0, 1), min_replicas=1)
    world.lose(2, returns=True)
    assert without(world.arrive(prompt=290, output=11), "timer") == [], "it waits for node 2"
    assert world.play(NodeGivenUp(world.at, 2)) == ["fail 0"]
