"""Recovery: nodes that serve in two instances, or load and feed at once, and lost connections in a second try."""

from __future__ import annotations

import pytest

from lambdascale.control.start import MulticastStart
from lambdascale.core.events import ConnectionLost
from lambdascale.multicast import BinomialPipeline
from lambdascale.testing.starts import SpreadStart, WithHolders
from tests.policy.test_scale_out import FAST_PCIE
from tests.policy.world import World, without


def test_a_node_is_not_given_up_while_it_serves_in_another_instance() -> None:
    """Node 0 has failed twice as a replica, and now fails as the second stage of a pipeline. Mutation: it is released."""
    world = World(nodes=2, start=MulticastStart(planner=BinomialPipeline(), pipelines=WithHolders()))
    world.arrive(4)
    for instance in ("i1", "i2"):
        world.fail(instance=instance)
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t2 0:gpu>1"]
    assert world.block(1, 0, 1) == ["serve i4 1:0-1,0:2-3", "dispatch i4 2,3"]
    for transfer in ("t2", "t3"):
        last = world.fail(transfer=transfer)
    assert last == ["cancel t3", "load t4 1 ssd 23"], "node 0 feeds nobody any more"
    assert world.fail(instance="i4") == ["stop i4"], "replica i3 goes on"
    assert world.deliver("t4") == ["serve i5 1", "dispatch i5 2,3"]


@pytest.mark.parametrize("tries", [0, 1])
def test_a_lost_connection_neither_uses_up_the_second_try_nor_gives_another(tries: int) -> None:
    """Mutation: a multicast that is planned anew for it thought to be a first try, or a second."""
    world = World(nodes=4)
    world.arrive(8)
    assert world.tick()[-2] == "multicast t2 0:gpu>1,2,3"
    for transfer in ("t2",)[:tries]:
        world.fail(transfer=transfer)
    lines = without(world.play(ConnectionLost(world.at, 0, 1)), "timer")
    assert lines == [f"cancel t{2 + tries}", f"multicast t{3 + tries} 0:gpu>1,2,3"]
    kinds = [line.split()[0] for line in world.fail(transfer=f"t{3 + tries}")]
    assert kinds == ["cancel", *(["load"] * 3 if tries else ["multicast"])]


def loading_and_feeding() -> World:
    """Node 0 loads its host copy (t1) and feeds node 1 from it (t2)."""
    world = World("lambdascale", nodes=4, copies=1, min_replicas=0, cluster={"pcie_bytes_per_s": 6.4e9})
    world.arrive(4)
    assert without(world.tick(), "timer")[2:] == ["load t1 0 host 2301", "multicast t2 0:host>1"]
    return world


def test_a_host_copy_goes_on_feeding_when_its_nodes_own_load_is_given_up() -> None:
    """Mutation: the multicast is cancelled as if it needed the node's GPU memory."""
    assert loading_and_feeding().fail(transfer="t1") == ["cancel t1", "release 0"]


def test_blocks_of_an_unfinished_load_are_no_source_of_a_new_plan() -> None:
    """The host copy feeds again. Mutation: node 0 counts with the one block on its GPU, and node 1 loads from its SSD."""
    world = loading_and_feeding()
    world.block(0, 2)
    assert world.play(ConnectionLost(world.at, 0, 1)) == ["cancel t2", "multicast t3 0:host>1"]


def test_a_complete_node_takes_the_requests_of_a_pipeline_over_whose_other_node_is_given_up() -> None:
    """Mutation: they wait beside the free replica until something else happens."""
    world = World(nodes=4, copies=2, min_replicas=0, cluster=FAST_PCIE)
    world.arrive(4)
    assert without(world.tick(), "timer", "allocate") == ["load t1 0 host 0123", "load t2 1 host 2301"]
    world.deliver("t2", 2)
    world.deliver("t1")
    assert {world.at_instance[request] for request in range(4)} == {world.at_instance[0]}, "pipeline i1 has them"
    assert world.fail(transfer="t2") == ["cancel t2", "stop i1", "release 1", "serve i2 0", "dispatch i2 0,1"]


def test_only_nodes_that_were_to_serve_with_a_lost_one_load_the_rest_of_the_model() -> None:
    """Shares on nodes 0 and 1, and on 2 and 3. Mutation: 2 and 3, whose pipeline can still form, load everything."""
    world = World(nodes=4, min_replicas=0, start=SpreadStart(nodes=2))
    world.arrive(4)
    assert without(world.tick(), "timer", "allocate") == [
        *["load t1 0 ssd 01", "load t2 1 ssd 23", "load t3 2 ssd 01", "load t4 3 ssd 23"]
    ]
    assert world.lose(0) == ["cancel t1", "load t5 1 ssd 01"]


def test_nodes_that_load_the_rest_of_the_model_are_replicas() -> None:
    """Four shares, one is lost: three nodes load everything. Mutation: they count as three quarters of a replica."""
    world = World(nodes=8, min_replicas=0, start=SpreadStart())
    world.arrive(2)
    world.tick()
    assert without(world.lose(1), "timer", "cancel") == ["load t5 0 ssd 123", "load t6 2 ssd 013", "load t7 3 ssd 012"]
    world.arrive(4)
    assert without(world.tick(), "timer") == [], "six requests want three replicas"


def test_only_the_model_whose_load_failed_gives_its_node_up() -> None:
    """Mutation: b's load on the same node cancelled as well."""
    world = World("serverlessllm", nodes=1, gpus=2, models="ab", min_replicas=0)
    world.arrive(1, "a")
    world.arrive(1, "b")
    assert without(world.tick(), "timer", "allocate") == ["load t1 0 ssd 0123", "load t2 0b ssd 0123"]
    assert world.fail(transfer="t1") == ["cancel t1", "release 0"]
