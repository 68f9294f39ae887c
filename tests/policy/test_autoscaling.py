"""Times at which the plane looks, replicas it then wants, and models it takes room from."""

from __future__ import annotations

import pytest

from lambdascale.control import TurnAutoscaler
from lambdascale.core.events import NodeJoined, TimerFired, TokensProduced
from tests.policy.world import World, without


def test_replicas_are_in_place_when_all_nodes_have_joined() -> None:
    world = World(nodes=3, min_replicas=2)
    assert world.start == [
        "allocate 0",
        "load t1 0 instant 0123",
        "allocate 1",
        "load t2 1 instant 0123",
        "serve i1 0",
        "serve i2 1",
    ]
    early = World(nodes=3, joined=2, min_replicas=2)
    assert early.start == []
    assert early.play(NodeJoined(0.0, 2))[0] == "allocate 0"


def test_min_replicas_of_every_model_are_in_place_from_the_start() -> None:
    assert without(World(nodes=3, models="ab").start, "load", "serve") == ["allocate 0", "allocate 1b"]
    assert without(World(nodes=3, gpus=2, models="ab", min_replicas=2).start, "load", "serve") == [
        *["allocate 0", "allocate 1", "allocate 2b", "allocate 0b"],
    ], "the emptiest nodes first"


def test_host_copies_are_in_place_from_the_start_node_after_node() -> None:
    assert World(nodes=3, models="ab", min_replicas=0, copies=1).start == ["place 0", "place 1b"]
    assert World(nodes=3, models="ab", min_replicas=0, copies=2).start == ["place 0", "place 1", "place 2b", "place 0b"]
    assert World(nodes=2, min_replicas=0, copies=5).start == ["place 0", "place 1"], "one a node"
    assert World(nodes=2, min_replicas=0, copies=2, host_budget=10).start == [], "what does not fit is not placed"


@pytest.mark.parametrize(
    ("at", "timer"), [(0.0, "timer 0"), (0.03, "timer 0.1"), (0.1, "timer 0.1"), (0.3, "timer 0.3"), (0.3 + 1e-12, "timer 0.3")]
)
def test_the_timer_is_on_the_grid_of_the_interval(at: float, timer: str) -> None:
    world = World(nodes=1)
    world.at = at
    assert world.arrive() == ["dispatch i1 0", timer]


def test_one_timer_at_a_time_and_only_while_there_is_work() -> None:
    world = World(nodes=1)
    assert world.arrive(2) == ["dispatch i1 0", "timer 0", "dispatch i1 1"]
    assert world.tick() == ["timer 0.1"], "strictly later than now"
    world.finish(0, 1)
    assert world.tick() == [], "one replica is wanted, one is in place: nothing can change by itself"
    assert world.arrive() == ["dispatch i1 2", "timer 0.1"]


def test_a_timer_that_was_replaced_is_ignored() -> None:
    world = World(nodes=2)
    world.arrive(5)
    assert world.play(TimerFired(0.0, 10_000)) == []
    assert world.tick()[0] == "allocate 1"


def test_a_fixed_number_of_replicas_needs_no_timer_while_they_run() -> None:
    world = World(nodes=3, min_replicas=2, max_replicas=2)
    world.arrive(9)
    assert world.tick() == []
    assert world.lose(0)[-1:] == ["timer 0"], "one is missing now"
    assert world.tick()[0] == "allocate 2"


def test_tokens_need_no_decision() -> None:
    world = World(nodes=1)
    world.arrive()
    assert world.play(TokensProduced(0.0, world.at_instance[0], 0, 1, "local")) == []


@pytest.mark.parametrize(("requests", "new"), [(2, 0), (3, 1), (4, 1), (5, 2), (20, 3)])
def test_replicas_in_proportion_to_queued_and_running_requests(requests: int, new: int) -> None:
    world = World(nodes=4)
    world.arrive(requests)
    assert sum(line.startswith("allocate") for line in world.tick()) == new


def test_no_more_than_max_replicas() -> None:
    world = World(nodes=4, max_replicas=2)
    world.arrive(20)
    assert without(world.tick(), "multicast", "timer") == ["allocate 1"]


@pytest.mark.parametrize(("autoscaler", "then"), [("queue", ["allocate 2"]), ("turns", [])])
def test_a_scale_out_waits_its_turn(autoscaler: str, then: list[str]) -> None:
    """Mutations: scale-outs that overlap, or a turn that never comes."""
    world = World("serverlessllm", nodes=4, autoscaler=autoscaler, max_batch=1, target=1)
    world.arrive(2)
    assert without(world.tick(), "load", "timer") == ["allocate 1"]
    world.arrive(1)
    assert without(world.tick(), "load", "timer") == then
    world.deliver("t2")
    assert without(world.tick(), "load", "timer") == ([] if then else ["allocate 2"]), "the last one has ended"


@pytest.mark.parametrize(("autoscaler", "meanwhile", "after"), [("queue", 1, 1), ("turns", 0, 2)])
def test_nothing_is_released_before_a_scale_out_has_ended(autoscaler: str, meanwhile: int, after: int) -> None:
    """Mutation: turns for scale-outs only."""
    world = World("serverlessllm", nodes=4, autoscaler=autoscaler, max_batch=1, target=1, keep_alive_s=0.0)
    world.arrive(2)
    world.tick()
    world.deliver("t2")
    world.arrive(1)
    assert without(world.tick(), "load", "timer") == ["allocate 2"]
    world.finish(0)  # request 2 runs there now
    world.finish(1)
    assert sum(line.startswith("release") for line in world.tick()) == meanwhile
    world.deliver("t3")
    assert sum(line.startswith("release") for line in world.tick()) == after


@pytest.mark.parametrize(
    ("queued", "running", "wanted"), [(0, 0, 1), (3, 4, 1), (4, 4, 2), (7, 4, 2), (8, 4, 3), (0, 5, 2), (4, 5, 3), (40, 0, 6)]
)
def test_a_queue_is_divided_by_what_a_node_runs_at_once(queued: int, running: int, wanted: int) -> None:
    """Mutation: the default's rule, which rounds the sum up."""
    assert TurnAutoscaler(target_per_replica=4, max_replicas=6).desired(queued, running) == wanted


@pytest.mark.parametrize(
    ("queued", "running", "wanted"), [(0, 0, 0), (1, 0, 1), (3, 0, 1), (4, 0, 1), (8, 0, 2), (3, 1, 1), (0, 1, 1)]
)
def test_a_few_requests_get_a_first_replica_under_the_rule_that_rounds_down(queued: int, running: int, wanted: int) -> None:
    """No minimum is kept. Mutation: fewer requests than a node runs at once wait for ever, and the run does not end."""
    assert TurnAutoscaler(target_per_replica=4, min_replicas=0).desired(queued, running) == wanted


@pytest.mark.parametrize("requests", [0, 1])
def test_a_fixed_number_that_is_not_reached_is_looked_for_again(requests: int) -> None:
    """Node 4 waits for node 0, which feeds 3. Mutations: no further look while requests run, or while none does."""
    world = World("faasnet", nodes=5, min_replicas=3, max_replicas=3, source_rule="GpuAndHostSources")
    world.arrive(requests)
    world.lose(1)
    assert without(world.tick(), "timer") == ["allocate 3", "multicast t4 0:gpu>3"]
    world.lose(2)
    assert world.tick() == ["timer 0.1"]
    world.deliver("t4")
    assert world.tick()[:2] == ["allocate 4", "multicast t5 0:gpu>4"]


def test_a_node_holds_one_replica_of_a_model() -> None:
    """Mutation: the node's other GPU allocated to the same model, whose record is lost."""
    world = World(nodes=2, gpus=2)
    world.arrive(8)
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t2 0:gpu>1"]
    assert without(world.tick(), "timer") == []


# -- scale-in --------------------------------------------------------------------------------------------------------


def idle_world(**settings: object) -> World:
    """Replicas i1 to i3 on nodes 0 to 2; they became idle at 0.2, 0.1 and 0.3, node 0 being the minimum's."""
    world = World(nodes=3, min_replicas=1, **settings)
    world.arrive(6)
    world.tick()
    world.deliver("t2")
    for at, requests in ((0.1, (2, 3)), (0.2, (0, 1)), (0.3, (4, 5))):
        world.at = at
        world.finish(*requests)
    return world


def test_replicas_are_released_when_too_many_for_the_keep_alive_longest_idle_first() -> None:
    world = idle_world(keep_alive_s=1.0)
    assert world.tick(1.0) == ["timer 1.1"], "a second ago, six requests wanted three"
    assert world.tick() == ["stop i2", "release 1 keep", "stop i1", "release 0 keep"], "the last one stays: it is the minimum"


def test_no_more_replicas_are_released_than_are_too_many() -> None:
    world = idle_world(keep_alive_s=0.0)
    world.arrive(3)  # 6 to 8 go to i1, i2 and i3: two replicas are wanted
    world.finish(6, 7, 8)
    world.arrive(3)
    world.finish(9)
    assert world.tick() == ["stop i1", "release 0 keep", "timer 0.4"], "i2 and i3 have requests"


def test_a_replica_with_requests_is_not_released() -> None:
    world = World(nodes=2, min_replicas=2, keep_alive_s=0.0, max_replicas=2)
    world.arrive(2)
    world.finish(0)
    assert world.tick() == []


def test_a_node_is_not_released_while_it_feeds_a_multicast() -> None:
    """Mutation: idle replicas regardless of their transfers."""
    world = World(nodes=3, min_replicas=0, keep_alive_s=0.0)
    world.arrive()
    world.tick()
    world.deliver("t1")
    world.arrive(5)
    assert world.tick()[-2:] == ["multicast t2 0:gpu>1,2", "timer 0.2"]
    world.finish(*range(6))
    assert world.tick() == ["timer 0.3"], "idle, of no use, and the source of t2"
    world.deliver("t2", 5)
    assert world.tick() == ["timer 0.4"], "one block is still to be sent"
    world.deliver("t2")
    assert without(world.tick(), "stop") == ["release 0 keep", "release 1 keep", "release 2 keep"]


def test_a_destination_that_is_complete_stays_until_it_has_passed_its_blocks_on() -> None:
    world = World(nodes=3, min_replicas=0, keep_alive_s=0.0, blocks=1)
    world.arrive(6)
    world.tick()
    world.deliver("t1")
    world.lose(1)
    world.lose(2)
    world.finish(0, 1)
    assert world.tick()[0] == "timer 0.2"


def test_weights_of_a_released_node_stay_as_a_host_copy_where_there_is_room() -> None:
    assert "release 0" in release_a(host_copies=False)
    assert "release 0" in release_a(host_budget=10**8)
    assert "release 0 keep" in release_a(host_budget=10**9)


def release_a(**settings: object) -> list[str]:
    world = World(nodes=1, min_replicas=0, keep_alive_s=0.0, **settings)
    world.arrive()
    world.tick()
    world.deliver("t1")
    world.finish(0)
    return world.tick()


def test_room_for_a_copy_is_made_before_the_copy() -> None:
    world = World(nodes=1, models="ab", min_replicas=0, keep_alive_s=0.0, host_budget=10**9)
    for model, transfer in (("a", "t1"), ("b", "t2")):
        world.arrive(1, model)
        world.tick()
        world.deliver(transfer)
        world.finish(world.requests - 1)
        last = world.tick()
    assert last == ["stop i2", "evict 0", "release 0b keep"]


# -- several models --------------------------------------------------------------------------------------------------


def crowded(models: str, *replicas: int, nodes: int | None = None, **settings: object) -> World:
    """``replicas`` of each model, idle: those that got requests later than those that did not. Keep-alive has not passed."""
    world = World(nodes=nodes or sum(replicas), models=models, min_replicas=0, target=1, keep_alive_s=100.0, **settings)
    for model, count in zip(models, replicas, strict=True):
        world.arrive(count, model)
        world.tick()
        for transfer in world.open_transfers():
            world.deliver(transfer)
    world.finish(*range(world.requests))
    return world


def test_idle_replicas_of_other_models_make_room() -> None:
    world = crowded("ab", 1, 0)
    world.arrive(1, "b")
    assert world.tick()[:4] == ["stop i1", "release 0 keep", "allocate 0b", "load t2 0b ssd 0123"]


def test_a_first_replica_comes_before_an_idle_one_that_is_wanted() -> None:
    """Two requests on i1 want two replicas of a, so that i2 is no surplus; it is idle, and b has none.

    Mutation: a model's first replica treated as a further one, which waits for a surplus.
    """
    world = crowded("ab", 2, 0)
    world.arrive(3, "a")
    world.finish(world.requests - 2)
    assert world.arrive(1, "b") == []
    assert without(world.tick(), "timer", "load") == ["stop i2", "release 1 keep", "allocate 1b"]


def test_no_room_is_taken_from_a_model_that_needs_it() -> None:
    """Mutation: replicas taken although the other model's surplus is not positive. b has a replica and wants another."""
    world = crowded("ab", 2, 1)
    world.arrive(3, "a")
    world.finish(world.requests - 2)
    world.arrive(2, "b")
    assert without(world.tick(), "timer") == [], "i2 of a is idle, but two requests on i1 want two replicas"


def on_first(world: World, requests: int) -> None:
    """Requests of a on its first replica; those sent to its two others have ended."""
    first = world.requests
    world.arrive(3 * requests, "a")
    world.finish(*(r for r in range(first, world.requests) if world.at_instance[r] != world.at_instance[first]))


def test_idle_replicas_that_are_wanted_are_not_taken() -> None:
    """Mutation: as many idle replicas taken as are lacking. Two requests on one of three replicas want two of them."""
    world = crowded("ab", 3, 0)
    on_first(world, 2)
    world.arrive(3, "b")
    assert without(world.tick(), "load", "timer") == ["stop i2", "release 1 keep", "allocate 1b"]


def test_nothing_is_taken_from_a_model_that_has_too_few() -> None:
    """Mutation: the sign of the other model's surplus not looked at. Four requests on one of three replicas want four."""
    world = crowded("ab", 3, 1, max_batch=4)
    on_first(world, 4)
    world.arrive(3, "b")
    assert without(world.tick(), "load", "timer") == []


def test_only_a_surplus_is_taken_and_no_more_than_is_lacking() -> None:
    world = crowded("ab", 3, 0)
    world.arrive(1, "a")  # one of the three replicas is wanted: two are too many
    world.arrive(3, "b")
    assert without(world.tick(), "load", "timer") == [
        *["stop i3", "release 2 keep", "stop i2", "release 1 keep", "allocate 1b", "allocate 2b"],
    ]
    world = crowded("ab", 3, 0)
    world.arrive(1, "b")
    assert without(world.tick(), "load", "timer") == ["stop i3", "release 2 keep", "allocate 2b"]


def test_what_one_model_gave_need_not_come_from_another() -> None:
    world = crowded("abc", 1, 1, 0)
    world.arrive(1, "c")
    assert without(world.tick(), "load", "timer") == ["stop i1", "release 0 keep", "allocate 0c"]


def test_nothing_is_taken_while_nodes_are_free() -> None:
    world = crowded("ab", 1, 0, nodes=2)
    world.arrive(1, "b")
    assert without(world.tick(), "load", "timer") == ["allocate 1b"]


def test_free_nodes_count_before_idle_ones() -> None:
    world = crowded("ab", 2, 0, nodes=3)
    world.arrive(2, "b")
    assert without(world.tick(), "load", "timer", "multicast") == ["stop i2", "release 1 keep", "allocate 1b", "allocate 2b"]


def test_longest_idle_replicas_make_room_first() -> None:
    world = crowded("ab", 2, 0)
    world.at = 0.5
    world.arrive(1, "a")
    world.finish(world.requests - 1)  # i1 was used once more
    world.arrive(1, "b")
    assert without(world.tick(), "load", "timer")[:2] == ["stop i2", "release 1 keep"]
