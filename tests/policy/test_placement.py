"""Placement: which nodes a scale-out takes."""

from __future__ import annotations

import pytest

from lambdascale.core import NodeOverride
from tests.policy.test_scale_out import FAST_PCIE, scaled
from tests.policy.world import World, without


def test_locality_takes_warm_nodes_first() -> None:
    """Paper, section 5, where nodes load their own copies."""
    assert scaled(3, nodes=5, copies=2, cluster=FAST_PCIE) == ["allocate 1", "load t2 1 host 0123"]


@pytest.mark.parametrize(("system", "cluster"), [("lambdascale", FAST_PCIE), ("serverlessllm", None)])
def test_a_models_own_copy_is_what_makes_a_node_warm(system: str, cluster: dict[str, object] | None) -> None:
    """Node 0 has a copy of a, node 1 one of b."""
    world = World(system, nodes=3, models="ab", copies=1, min_replicas=0, cluster=cluster)
    world.arrive(1, "b")
    assert without(world.tick(), "timer") == ["allocate 1b", "load t1 1b host 0123"]


def test_copies_are_spared_where_they_do_more_good_as_sources() -> None:
    assert scaled(3, nodes=5, copies=2) == ["allocate 3", "multicast t2 2:gpu>3"]


def test_copies_are_spared_where_the_network_is_faster_than_some_nodes_pcie() -> None:
    """Mutation: one node with a fast PCIe decides for all."""
    fast = {"overrides": (NodeOverride(nodes=(4,), pcie_bytes_per_s=8e9),)}
    assert scaled(3, nodes=5, copies=2, cluster=fast) == ["allocate 3", "multicast t2 2:gpu>3"]


@pytest.mark.parametrize(("system", "cluster"), [("lambdascale", None), ("lambdascale", FAST_PCIE), ("serverlessllm", None)])
def test_nodes_that_load_least_then_the_emptiest_are_taken(system: str, cluster: dict[str, object] | None) -> None:
    """Two models on nodes of two GPUs: a loads on 0 and 1; b takes 2, then the one of the others with the smaller id."""
    world = World(system, nodes=3, gpus=2, models="abc", min_replicas=0, cluster=cluster)
    world.arrive(4, "a")
    assert without(world.tick(), "load", "timer") == ["allocate 0", "allocate 1"]
    world.arrive(2, "b")
    assert without(world.tick(), "load", "timer") == ["allocate 2b"], "nothing is to be loaded there"
    for transfer in world.open_transfers():
        world.deliver(transfer)
    world.arrive(2, "c")
    assert without(world.tick(), "load", "timer") == ["allocate 0c"], "all loaded, all half full"


def test_the_emptiest_node_is_taken_when_none_loads() -> None:
    for system, cluster in (("lambdascale", None), ("lambdascale", FAST_PCIE), ("serverlessllm", None)):
        world = World(system, nodes=3, gpus=2, models="ab", min_replicas=0, cluster=cluster)
        world.arrive(2, "a")
        world.tick()
        world.deliver("t1")
        world.arrive(4, "b")
        assert without(world.tick(), "load", "timer") == ["allocate 1b", "allocate 2b"]


def test_startup_time_weighs_a_queue_on_a_node_against_the_tier() -> None:
    """ServerlessLLM: host memory at 2 GB/s against SSD at 0.5 GB/s, so that a warm node may have more to load first."""
    world = World("serverlessllm", nodes=2, gpus=4, models="abcde", min_replicas=0, copies=0, host_budget=10**9)
    assert world.start == []
    world.arrive(1, "e")
    world.tick()
    world.deliver("t1")
    world.finish(0)
    world.tick(5.0)
    assert world.commands[-1].keep_host, "node 0 has a copy of e"
    for model, node in (("a", 0), ("b", 1), ("c", 0), ("d", 1)):
        world.arrive(1, model)
        assert without(world.tick(), "load", "timer") == [f"allocate {node}{'' if model == 'a' else model}"]
    world.arrive(1, "e")
    assert without(world.tick(), "timer")[:2] == ["allocate 0e", "load t6 0e host 0123"], (
        "3 GB at 2 GB/s against 3 GB at 0.5 GB/s"
    )


def test_nodes_without_enough_gpus_are_not_taken() -> None:
    world = World(nodes=2, models="ab")
    world.arrive(9, "a")
    assert world.tick() == ["timer 0.1"], "node 1 is b's"
