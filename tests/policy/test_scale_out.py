"""Scale-out: which nodes are taken, what they read from, and who feeds whom."""

from __future__ import annotations

import pytest

from lambdascale.core.commands import LoadBlocks, StartMulticast
from tests.policy.world import World, without

FAST_PCIE = {"pcie_bytes_per_s": 8e9}  # against 3.2 GB/s of the network


def scaled(requests: int, system: str = "lambdascale_tuned", **settings: object) -> list[str]:
    """The commands of the first look after a burst."""
    world = World(system, **settings)
    world.arrive(requests)
    return without(world.tick(), "timer")


# -- sources ---------------------------------------------------------------------------------------------------------


def test_a_multicast_brings_the_model_from_a_replica() -> None:
    assert scaled(5, nodes=4) == ["allocate 1", "allocate 2", "multicast t2 0:gpu>1,2"]


@pytest.mark.parametrize(
    ("sources", "used"), [("auto", "0:gpu,1:gpu"), (1, "0:gpu"), (2, "0:gpu,1:gpu")], ids=["auto", "one", "two"]
)
def test_as_many_sources_as_configured_and_no_more_than_destinations(sources: object, used: str) -> None:
    assert scaled(9, nodes=5, min_replicas=2, sources=sources) == [
        *["allocate 2", "allocate 3", "allocate 4", f"multicast t3 {used}>2,3,4"],
    ]
    assert scaled(5, nodes=5, min_replicas=2, sources=sources) == ["allocate 2", "multicast t3 0:gpu>2"], "one a destination"


def test_replicas_feed_before_host_copies() -> None:
    """Node 3 is a replica; 0 and 1 hold copies that are not taken themselves."""
    world = World(nodes=6, copies=2, target=1)
    assert world.start[2] == "allocate 2"
    world.arrive(3)
    assert without(world.tick(), "timer") == ["allocate 3", "allocate 4", "multicast t2 2:gpu,0:host>3,4"]


def test_host_copies_do_not_feed_where_the_system_has_none_as_sources() -> None:
    assert scaled(5, nodes=6, copies=2, source_rule="GpuSources")[-1] == "multicast t2 2:gpu>3,4"
    world = World(nodes=3, copies=1, min_replicas=0, source_rule="GpuSources")
    world.arrive(3)
    assert [line.split()[3] for line in without(world.tick(), "allocate", "timer")] == ["ssd", "ssd"], "nobody can feed"


def test_an_expired_host_copy_feeds_nobody() -> None:
    """Mutation: host copies chosen although their keep-alive has passed."""
    for at, shown in ((4.0, "2:gpu,0:host>3,4"), (5.0, "2:gpu,0:host>3,4"), (5.1, "2:gpu>0,3")):
        world = World(nodes=6, copies=1, min_replicas=2, host_keep_alive_s=5.0)
        world.lose(1)
        world.at = at
        world.arrive(5)
        assert without(world.tick(), "timer", "allocate") == [f"multicast t3 {shown}"], at


def test_an_expired_host_copy_is_not_loaded_from() -> None:
    for at, tier in ((5.0, "host"), (5.1, "ssd")):
        world = World("serverlessllm", nodes=1, copies=1, min_replicas=0, host_keep_alive_s=5.0)
        world.at = at
        world.arrive()
        assert world.tick()[1] == f"load t1 0 {tier} 0123"


def test_a_copy_that_is_read_does_not_expire_and_its_keep_alive_starts_anew_afterwards() -> None:
    """Mutations: a pin or its end forgotten."""
    world = World(nodes=4, copies=1, min_replicas=0, target=1, host_keep_alive_s=5.0)
    world.at = 4.0
    world.arrive(1)
    assert world.tick()[:2] == ["allocate 1", "multicast t1 0:host>1"]
    world.at = 20.0
    world.arrive(1)
    assert without(world.tick(20.0), "timer") == [], "the copy is still there and busy: a node waits for it instead of the SSD"
    world.deliver("t1")
    world.at = 24.0
    world.arrive(1)
    assert without(world.tick(24.0), "timer")[-1] == "multicast t2 1:gpu,0:host>2,3"
    world.deliver("t2")
    world.lose(1)
    world.lose(2)
    world.lose(3)
    world.at = 29.1
    assert without(world.tick(), "timer")[:2] == ["allocate 0", "load t3 0 ssd 0123"], "unused since 24.0: expired"


def test_a_source_feeds_one_multicast_at_a_time() -> None:
    """Mutation: a source used twice at once."""
    world = World(nodes=4)
    world.arrive(4)
    world.tick()
    world.arrive(2)
    assert world.tick() == ["timer 0.2"], "nodes that depend on a busy source are not taken yet"
    world.deliver("t2")
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t3 0:gpu>2"]


def test_new_nodes_join_a_tree_that_is_under_way() -> None:
    """FaaSNet: 3 becomes a child of 2, a leaf of the tree from 0, and 4 one of 3's. Mutation: a join to an inner node."""
    world = World("faasnet", nodes=6, target=1)
    world.arrive(3)
    assert without(world.tick(), "timer")[-1] == "multicast t2 0:gpu>1,2"
    world.deliver("t2", 3)
    world.arrive(1)
    assert without(world.tick(), "timer") == ["allocate 3", "multicast t3 1:gpu>3"], "0 still sends; 1 and 2 do not, and receive"
    world.arrive(1)
    assert without(world.tick(), "timer") == ["allocate 4", "multicast t4 2:gpu>4"]
    world.deliver("t2")
    world.arrive(1)
    assert without(world.tick(), "timer") == ["allocate 5", "multicast t5 0:gpu>5"], "the root is idle again"


def test_nodes_that_load_from_storage_are_not_joined() -> None:
    world = World("faasnet", nodes=4, min_replicas=0, target=1)
    world.arrive(1)
    assert without(world.tick(), "timer") == ["allocate 0", "load t1 0 ssd 0123"]
    world.arrive(1)
    assert without(world.tick(), "timer") == ["allocate 1", "load t2 1 ssd 0123"]


def test_nodes_wait_for_an_idle_source_where_they_do_not_join() -> None:
    world = World("faasnet", nodes=6, target=1, source_rule="GpuAndHostSources")
    world.arrive(3)
    world.tick()
    world.arrive(1)
    assert without(world.tick(), "timer") == []


def test_a_host_copy_that_feeds_is_busy_until_its_multicast_ends() -> None:
    world = World(nodes=4, copies=1, min_replicas=0)
    world.arrive(2)
    assert world.tick()[:2] == ["allocate 1", "multicast t1 0:host>1"]
    world.arrive(2)
    assert without(world.tick(), "timer") == []
    world.deliver("t1")
    world.arrive(2)
    assert without(world.tick(), "timer")[-1] == "multicast t2 1:gpu,0:host>2,3"


def test_warm_nodes_are_taken_while_all_sources_are_busy() -> None:
    world = World(nodes=5, copies=2, cluster=FAST_PCIE)
    assert world.start[2] == "allocate 0"
    world.arrive(6)
    assert without(world.tick(), "timer")[-2:] == ["load t2 1 host 0123", "multicast t3 0:gpu>2"]


# -- loads -----------------------------------------------------------------------------------------------------------


def test_without_a_holder_nodes_load_in_shifted_orders_and_form_a_pipeline() -> None:
    world = World(nodes=3, min_replicas=0)
    world.arrive(6)
    assert without(world.tick(), "timer") == [
        *["allocate 0", "allocate 1", "allocate 2"],
        *["load t1 0 ssd 0123", "load t2 1 ssd 1230", "load t3 2 ssd 2301"],
    ]
    assert world.block(0, 0) + world.block(1, 1) + world.block(2, 2, 3) == []
    assert world.block(1, 2) == ["serve i1 0:0-0,1:1-2,2:3-3", "dispatch i1 0,1,2,3,4,5"]


def test_a_single_node_loads_in_order() -> None:
    assert scaled(2, nodes=3, min_replicas=0) == ["allocate 0", "load t1 0 ssd 0123"]


def test_systems_without_pipelines_load_in_order() -> None:
    assert scaled(4, "faasnet", nodes=3, min_replicas=0)[-2:] == ["load t1 0 ssd 0123", "load t2 1 ssd 0123"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # PCIe slower than the network: the copies feed, or load while they would feed others.
        ({}, ["allocate 3", "allocate 4", "multicast t2 2:gpu,0:host>3,4"]),
        ({"cluster": FAST_PCIE}, ["allocate 1", "allocate 2", "load t2 1 host 0123", "multicast t3 0:gpu>2"]),
        (
            {"warm": "OwnCopies", "placement": "ByLocality"},
            ["allocate 1", "allocate 2", "load t2 1 host 0123", "multicast t3 0:gpu>2"],
        ),
        ({"warm": "NoOwnCopies"}, ["allocate 3", "allocate 4", "multicast t2 2:gpu,0:host>3,4"]),
        ({"warm": "NoOwnCopies", "cluster": FAST_PCIE}, ["allocate 1", "allocate 2", "multicast t2 0:gpu>1,2"]),
        # PCIe exactly as fast as the network counts as faster; now the pair serves together, and node 1 begins with the half
        # that node 2 gets last.
        ({"cluster": {"pcie_bytes_per_s": 3.2e9}}, ["allocate 1", "allocate 2", "load t2 1 host 2301", "multicast t3 0:gpu>2"]),
    ],
)
def test_a_warm_node_loads_itself_where_that_is_faster(settings: dict[str, object], expected: list[str]) -> None:
    assert scaled(5, nodes=5, copies=2, **settings) == expected


def test_warm_nodes_load_while_they_could_feed_others_from_host_memory() -> None:
    """Mutation: a warm node not loading itself when it should. Node 0 is warm and taken; 3 is cold."""
    taken = ["allocate 3", "allocate 0"]
    assert scaled(5, nodes=4, copies=1, min_replicas=2) == ["allocate 3", "multicast t3 1:gpu>3"]
    assert scaled(8, nodes=4, copies=1, min_replicas=2) == [*taken, "load t3 0 host 0123", "multicast t4 1:gpu>3"]
    assert scaled(8, nodes=4, copies=1, min_replicas=2, source_rule="GpuSources")[-1] == "multicast t3 1:gpu,2:gpu>3,0"
    assert scaled(6, nodes=3, copies=1, min_replicas=2)[-1] == "multicast t3 1:gpu>0", (
        "nobody else to feed: the network is faster"
    )
    assert scaled(8, nodes=4, copies=1, min_replicas=2, warm="NoOwnCopies")[-1] == "multicast t3 1:gpu,2:gpu>3,0"


def test_the_loader_is_the_systems() -> None:
    for system, loader in (("serverlessllm", "pipelined"), ("serverlessllm_prototype", "sequential")):
        world = World(system, nodes=2)
        world.arrive(4)
        world.tick()
        assert {c.loader for c in world.commands if isinstance(c, LoadBlocks) and c.tier == "ssd"} == {loader}


@pytest.mark.parametrize(
    ("system", "kind"), [("lambdascale", "one_sided"), ("faasnet", "one_sided"), ("nccl_broadcast", "collective")]
)
def test_the_kind_of_multicast_is_the_systems(system: str, kind: str) -> None:
    world = World(system, nodes=3)
    world.arrive(6)
    world.tick()
    (command,) = [c for c in world.commands if isinstance(c, StartMulticast)]
    assert (command.multicast, sum(command.block_bytes), len(command.block_bytes)) == (kind, 10**9, 4)


def test_ideal_scaling_takes_no_time() -> None:
    assert scaled(5, "ideal", nodes=4) == [
        *["allocate 1", "allocate 2", "load t2 1 instant 0123", "load t3 2 instant 0123"],
        *["serve i2 1", "dispatch i2 2,3", "serve i3 2", "dispatch i3 4"],
    ]


def test_a_broadcast_has_one_root_and_every_replica_broadcasts() -> None:
    """Mutation: k chains in one transfer, which would share a communicator."""
    assert scaled(9, "nccl_broadcast", nodes=5, min_replicas=2)[-2:] == ["multicast t3 0:gpu>2", "multicast t4 1:gpu>3,4"]
    assert scaled(9, "nccl_broadcast", nodes=5, min_replicas=2, sources=1)[-1] == "multicast t3 0:gpu>2,3,4"


@pytest.mark.parametrize("system", ["faasnet_prototype", "nccl_prototype"])
def test_the_prototypes_baselines_feed_from_gpus_only(system: str) -> None:
    """Reference, section 7: k = min(complete nodes, new nodes), from GPU memory; nobody loads its own copy."""
    world = World(system, nodes=6, copies=2, min_replicas=2, placement="SparingCopies")
    world.arrive(12)
    given = [line for line in world.tick() if line.startswith(("multicast", "load"))]
    assert [word for line in given for word in line.split()[2].split(">")[0].split(",")] == ["2:gpu", "3:gpu"]
    assert sorted(node for line in given for node in line.split(">")[1].split(",")) == ["0", "1", "4", "5"]


def test_a_prototypes_controller_starts_the_rounds_and_looks_every_half_second() -> None:
    for system, barrier_s in (("lambdascale_prototype", 0.006), ("faasnet_prototype", 0.002), ("lambdascale", None)):
        world = World(system, nodes=3)
        world.at = 0.3
        world.arrive(3)
        world.tick()
        (command,) = [c for c in world.commands if isinstance(c, StartMulticast)]
        assert command.barrier_s == barrier_s
        assert world.at == pytest.approx(0.3 if barrier_s is None else 0.5)


# -- warm nodes of the paper's system --------------------------------------------------------------------------------


def test_the_papers_system_takes_warm_nodes_first_and_lets_them_load_and_feed_and_serve() -> None:
    """Reference, section 2.6: node 0 loads its copy and feeds node 3 from it; both serve together before either is complete."""
    world = World("lambdascale", nodes=4, copies=1, min_replicas=0, cluster={"pcie_bytes_per_s": 6.4e9})
    world.arrive(4)
    assert without(world.tick(), "timer") == ["allocate 0", "allocate 1", "load t1 0 host 2301", "multicast t2 0:host>1"]
    assert world.block(1, 0, 1) + world.block(0, 2) == []
    assert world.block(0, 3) == ["serve i1 1:0-1,0:2-3", "dispatch i1 0,1,2,3"]


def test_a_slow_load_is_no_stage_of_an_early_pipeline() -> None:
    """Mutation: rounds of a load taken for rounds of the multicast. Node 2 has the whole model before 1 has loaded half."""
    world = World("lambdascale", nodes=4, copies=2, min_replicas=1, cluster={"pcie_bytes_per_s": 0.3e9})
    world.arrive(6)
    assert without(world.tick(), "timer")[2:] == ["load t2 1 host 0123", "multicast t3 0:gpu>2"]


def test_loads_begin_where_the_multicast_beside_them_leaves_gaps() -> None:
    """Four nodes hold a block each after a round, in which both host sources send one and load another.

    Mutation: a load counted in rounds at the NIC's rate; orders of loads as if the multicast had as many sub-groups.
    """
    world = World("lambdascale", nodes=4, copies=2, min_replicas=0)
    world.arrive(8)
    assert without(world.tick(), "timer", "allocate") == [
        *["load t1 0 host 1230", "load t2 1 host 3012", "multicast t3 0:host,1:host>2,3"]
    ]
    assert world.block(2, 0) + world.block(0, 1) + world.block(3, 2) == []
    assert world.block(1, 3) == ["serve i1 2:0-0,0:1-1,3:2-2,1:3-3", "dispatch i1 0,1,2,3,4,5,6,7"]


# -- placement -------------------------------------------------------------------------------------------------------


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
