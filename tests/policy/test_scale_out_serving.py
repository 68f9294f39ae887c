"""Scale-out: serving while blocks arrive."""

from __future__ import annotations

import pytest
from hydra.errors import InstantiationException

from lambdascale.core import NodeOverride
from tests.policy.test_scale_out import FAST_PCIE, scaled
from tests.policy.world import World, pipelined, without

# -- serving while blocks arrive -------------------------------------------------------------------------------------


def test_a_pipeline_forms_with_its_last_missing_block_and_takes_as_many_batches_as_it_has_nodes() -> None:
    world = pipelined()
    assert world.arrive(1) == [], "4 of 4 slots are taken"


def test_blocks_that_a_node_has_already_or_of_nodes_nobody_knows_change_nothing() -> None:
    world = pipelined()
    assert world.untold_block(2, 0) == world.untold_block(9, 0) == []


def test_mode_switch_when_all_nodes_are_complete() -> None:
    world = pipelined()
    assert world.deliver("t3", 3) == [], "node 2 is complete, its pipeline goes on until 3 is"
    assert world.deliver("t3") == ["serve i4 2", "serve i5 3", "switch i3 4>i4,5>i5,6>i4,7>i5 recompute"]
    assert world.finish(4) == ["dispatch i4 8"]


def test_the_kv_policy_of_a_mode_switch_is_the_systems() -> None:
    assert pipelined(kv="copy").deliver("t3")[-1] == "switch i3 4>i4,5>i5,6>i4,7>i5 copy"


def test_a_mode_switch_makes_room_for_the_queue() -> None:
    world = pipelined()
    world.finish(4, 5)  # 8 goes to the pipeline
    world.arrive(2)
    assert world.deliver("t3")[-1] == "switch i3 6>i4,7>i5,8>i4,9>i5 recompute"
    assert world.finish(6, 7, 8) == ["dispatch i4 10"]


def test_a_pipeline_that_comes_too_late_is_dropped() -> None:
    world = World(nodes=4, min_replicas=2)
    world.arrive(9)
    world.tick()
    assert world.block(2, 0, 1, 2, 3) == ["serve i3 2", "dispatch i3 4,5"]
    assert world.block(3, 2, 3) == [], "no pipeline with a node that serves alone"
    assert world.block(3, 0, 1) == ["serve i4 3", "dispatch i4 6,7"]


def test_scale_out_goes_on_while_a_pipeline_serves() -> None:
    """Nodes that are getting the model count as replicas."""
    world = pipelined()
    assert world.tick() == ["timer 0.2"]


def test_what_is_to_be_loaded_counts_before_what_is_free() -> None:
    """a loads on node 0, which has two GPUs left; b and c are complete on node 1, which has one."""
    for system, cluster in (("lambdascale", None), ("lambdascale", FAST_PCIE), ("serverlessllm", None)):
        world = World(system, nodes=2, gpus=3, models="abcd", min_replicas=0, cluster=cluster)
        world.arrive(1, "a")
        world.tick()
        for model in "bc":
            world.arrive(1, model)
            assert without(world.tick(), "load", "timer") == [f"allocate 1{model}"]
            world.deliver(world.open_transfers()[-1])
        world.arrive(1, "d")
        assert without(world.tick(), "load", "timer") == ["allocate 1d"], system


def test_two_nodes_are_enough_for_a_pipeline_of_loads() -> None:
    assert scaled(4, nodes=2, min_replicas=0)[-2:] == ["load t1 0 ssd 0123", "load t2 1 ssd 2301"]


def test_warm_nodes_load_together_and_serve_together() -> None:
    world = World(nodes=4, copies=2, min_replicas=0, cluster=FAST_PCIE)
    world.arrive(4)
    assert without(world.tick(), "timer")[-2:] == ["load t1 0 host 0123", "load t2 1 host 2301"]
    world.deliver("t1", 2)
    assert world.deliver("t2", 2) == ["serve i1 0:0-1,1:2-3", "dispatch i1 0,1,2,3"]


def test_a_warm_node_loads_its_copy_while_the_only_source_is_busy() -> None:
    """Node 1 was released while 0 feeds 2: it is taken again and loads its copy; 3 would depend on 0 and is not taken."""
    world = World(nodes=4, min_replicas=0, keep_alive_s=0.0, source_rule="GpuSources", cluster=FAST_PCIE)
    world.arrive(4)
    world.tick()
    for transfer in ("t1", "t2"):
        world.deliver(transfer)
    world.arrive(1)
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t3 0:gpu>2"]
    world.finish(2, 3, 4)
    assert without(world.tick(), "timer") == ["stop i2", "release 1 keep"]
    world.arrive(8)
    assert without(world.tick(), "timer") == ["allocate 1", "load t4 1 host 0123"]


def test_hardware_of_each_node_counts() -> None:
    """Node 1 has a faster SSD; then, a PCIe that is faster than the network."""
    fast_ssd = {"overrides": (NodeOverride(nodes=(1,), ssd_bytes_per_s=1e9),)}
    assert scaled(1, "serverlessllm", nodes=3, min_replicas=0, cluster=fast_ssd)[0] == "allocate 1"
    fast_pcie = {"overrides": (NodeOverride(nodes=(1,), pcie_bytes_per_s=8e9),)}
    world = World(nodes=3, copies=2, min_replicas=0, source_rule="GpuSources", cluster=fast_pcie)
    world.arrive(6)
    assert without(world.tick(), "timer")[-1].startswith("load t3"), "nobody can feed: each for itself"


def test_a_fixed_number_of_sources_needs_as_many_from_the_start() -> None:
    for settings in ({"sources": 3, "copies": 2}, {"sources": 3, "min_replicas": 3}, {"sources": 1, "min_replicas": 0}):
        World(nodes=4, **settings)
    wrong: list[dict[str, object]] = [
        *({"sources": 3, "copies": 1}, {"sources": 2}, {"sources": 3, "copies": 2, "source_rule": "GpuSources"}),
        *({"sources": 3, "copies": 2, "host_copies": False}, {"sources": 2, "min_replicas": 0}),
    ]
    for settings in wrong:
        with pytest.raises(InstantiationException, match=r"system\.start\.sources=. sub-groups need as many sources"):
            World(nodes=4, **settings)
