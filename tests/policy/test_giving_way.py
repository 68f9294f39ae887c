"""Requests that nothing can serve as things stand: what gives way to them, and what goes on when they are given up."""

from __future__ import annotations

import pytest

from lambdascale.control.start import MulticastStart
from lambdascale.core import GpuSpec, NodeOverride
from lambdascale.core.events import BlockArrived, NodeGivenUp, NodeJoined
from lambdascale.multicast import BinomialPipeline
from lambdascale.testing.starts import WithHolders
from lambdascale.testing.systems import small_cluster, small_model, with_kv_tokens
from tests.policy.world import World, without


def scarce(nodes: int, *small: int) -> dict[str, object]:
    """Fields of a cluster on which the ``small`` nodes have memory for 100 tokens of KV."""
    return {"overrides": with_kv_tokens(small_cluster(nodes), 100, small).overrides}


# -- minimums that give way ------------------------------------------------------------------------------------------------


def test_an_idle_minimum_gives_way_to_a_request_that_no_node_is_left_for() -> None:
    world = World(nodes=2, models="ab", min_replicas=1)
    world.lose(1)
    assert world.arrive(model="b") == []
    assert without(world.tick(), "timer") == ["stop i1", "release 0 keep", "allocate 0b", "load t3 0b ssd 0123"]


def test_a_model_at_work_does_not_give_way_until_it_is_idle() -> None:
    world = World(nodes=2, models="ab", min_replicas=1)
    world.lose(1)
    world.arrive(model="a")
    world.arrive(model="b")
    assert without(world.tick(), "timer") == []
    world.finish(0)
    assert without(world.tick(), "timer") == ["stop i1", "release 0 keep", "allocate 0b", "load t3 0b ssd 0123"]


def test_nothing_gives_way_while_a_replica_of_the_model_is_on_its_way_or_a_node_is_free() -> None:
    world = World(nodes=3, models="ab", min_replicas=1)
    world.lose(1)
    world.arrive(model="b")
    assert without(world.tick(), "timer") == ["allocate 2b", "load t3 2b ssd 0123"]
    assert without(world.tick(), "timer") == []


@pytest.mark.parametrize("prompt", [300, 79_335])
def test_the_node_that_can_hold_the_request_is_the_one_that_is_freed(prompt: int) -> None:
    """Memory for 79,345 tokens is just enough."""
    world = World(nodes=3, models="abc", min_replicas=1, cluster=scarce(3, 0, 1))
    assert world.arrive(model="a", prompt=prompt) == ["timer 0"]
    lines = without(world.tick(), "timer")
    assert lines == ["stop i3", "release 2c keep", "allocate 2", "multicast t4 0:gpu>2"]


def test_a_minimum_that_no_node_is_left_for_needs_no_further_looks() -> None:
    world = World(nodes=2, min_replicas=2)
    world.lose(1)
    assert world.tick() == [], "nothing can change before a node joins"
    assert world.play(NodeJoined(0.0, 1)) == ["timer 0"]
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t3 0:gpu>1"]


def test_a_replica_that_feeds_others_does_not_give_way() -> None:
    """Mutation: an idle one released in the middle of a transfer."""
    world = World(nodes=2, models="ab", min_replicas=0, keep_alive_s=100.0)
    world.arrive()
    world.tick()
    world.deliver("t1")
    world.arrive(3)
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t2 0:gpu>1"]
    world.finish(0, 1, 2, 3)
    world.arrive(model="b")
    assert without(world.tick(), "timer") == []
    assert world.deliver("t2") == ["serve i2 1"]
    assert "allocate 0b" in world.tick()


def test_an_idle_replica_does_not_give_way_on_a_node_that_a_pipeline_uses_too() -> None:
    """Replica i1 is idle on node 0, the second stage of pipeline i3. Mutation: i1 is stopped, and no node is freed."""
    start = MulticastStart(planner=BinomialPipeline(), pipelines=WithHolders())
    world = World(nodes=3, models="ab", min_replicas=1, keep_alive_s=100, start=start)
    world.lose(1)
    world.arrive(6)
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t3 0:gpu>2"]
    assert world.block(2, 0, 1) == ["serve i3 2:0-1,0:2-3", "dispatch i3 2,3,4,5"]
    for transfer in ("t3", "t4"):
        last = world.fail(transfer=transfer)
    assert last == ["cancel t4", "load t5 2 ssd 23"], "node 0 feeds nobody any more"
    world.finish(0, 1)
    world.arrive(model="b")
    assert without(world.tick(), "timer") == []


# -- queues that go on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_up", [True, False])
def test_a_queue_goes_on_when_its_head_is_given_up(given_up: bool) -> None:
    world = World(nodes=2, cluster=scarce(2, 0))
    world.lose(1, returns=True)
    assert world.arrive(prompt=300) == [], "node 1 could hold it"
    assert world.arrive(prompt=10) == [], "first come, first served"
    lines = world.play(NodeGivenUp(0.0, 1)) if given_up else world.play(NodeJoined(0.0, 1)) + world.lose(1)
    assert without(lines, "timer") == ["fail 0", "dispatch i1 1"]


# -- late news ---------------------------------------------------------------------------------------------------------------


def test_a_block_of_a_transfer_older_than_the_allocation_is_late_news() -> None:
    world = World("serverlessllm", nodes=1, min_replicas=0, blocks=2)
    world.arrive()
    assert "load t1 0 ssd 01" in world.tick()
    old = world.command("t1").transfer_id
    assert without(world.fail(transfer="t1"), "timer") == ["cancel t1", "release 0"]
    assert "load t2 0 ssd 01" in world.tick()
    for block in (0, 1):
        assert world.play(BlockArrived(world.at, old, 0, "a", block)) == []
    assert world.deliver("t2") == ["serve i1 0", "dispatch i1 0"]


# -- copies that a run starts with ---------------------------------------------------------------------------------------------


def test_initial_copies_of_several_models_stay_within_a_nodes_budget() -> None:
    """The last one stays, as it would if they were placed one after the other."""
    size = small_model().size_bytes
    assert World(nodes=1, models="abc", min_replicas=0, copies=1, host_budget=size).start == ["place 0c"]
    assert World(nodes=1, models="abc", min_replicas=0, copies=1, host_budget=2 * size).start == ["place 0b", "place 0c"]


def test_a_node_too_small_for_the_model_does_not_count_as_one_that_gives_way() -> None:
    tiny = GpuSpec(name="tiny", memory_bytes=1000, hbm_bytes_per_s=1e12, peak_flops=1e14)
    world = World(nodes=3, models="ab", min_replicas=1, cluster={"overrides": (NodeOverride(nodes=(2,), gpu=tiny),)})
    world.lose(1)
    world.arrive(model="b")
    assert without(world.tick(), "timer") == ["stop i1", "release 0 keep", "allocate 0b", "load t3 0b ssd 0123"]


def test_a_further_replica_is_not_made_of_one_that_a_model_at_work_has_idle() -> None:
    """b is to have two replicas, one works: the other stays, though a request of a fits on none of a's nodes.

    Mutation: what a model's first replica may take given to a further one, too.
    """
    world = World(nodes=4, models="ab", min_replicas=2, cluster=scarce(4, 0, 1))
    world.arrive(1, model="b")
    world.arrive(model="a", prompt=300)
    assert without(world.tick(), "timer") == []
    world.finish(0)
    assert without(world.tick(), "timer")[-2:] == ["allocate 2", "multicast t5 0:gpu>2"]
