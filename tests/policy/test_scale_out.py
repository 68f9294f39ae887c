"""Scale-out: which nodes are taken, what they read from, and who feeds whom."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import pytest

from lambdascale.control.start import MulticastStart
from lambdascale.core import MulticastPlan, NodeId, PipelinePlan
from lambdascale.core.commands import LoadBlocks, StartMulticast
from lambdascale.core.specs import NodeOverride
from lambdascale.multicast import validate_plan
from lambdascale.pipelines import IN_ROUNDS, Costs
from tests.policy.world import World, configured, without

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


def test_a_node_that_loads_is_passed_over_for_one_that_receives() -> None:
    """Mutation: node 1, which still loads from storage, taken as the parent because its NIC is idle."""
    world = World("faasnet", nodes=4, min_replicas=0, target=1)
    world.arrive(2)
    assert without(world.tick(), "timer", "allocate") == ["load t1 0 ssd 0123", "load t2 1 ssd 0123"]
    world.deliver("t1")
    world.arrive(1)
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t3 0:gpu>2"]
    world.arrive(1)
    assert without(world.tick(), "timer") == ["allocate 3", "multicast t4 2:gpu>3"]


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


@dataclass(frozen=True)
class PlansSeen:
    """A pipeline builder that builds none, and keeps the plans and holders that it is given."""

    plans: list[MulticastPlan] = field(default_factory=list)
    holders: list[list[NodeId]] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)

    def pipelines(
        self, plan: MulticastPlan, holders: Collection[NodeId] = (), costs: Costs = IN_ROUNDS
    ) -> Sequence[PipelinePlan]:
        self.plans.append(plan)
        self.holders.append(list(holders))
        self.round_s.append(costs.round_s)
        return ()


def seen_by_builders(requests: int, **settings: object) -> tuple[PlansSeen, list[str]]:
    """Arguments of pipeline builders at the first look after a burst, and its transfers."""
    seen = PlansSeen()
    start = configured("lambdascale_tuned").start
    assert isinstance(start, MulticastStart)
    world = World(start=replace(start, pipelines=seen), **settings)
    world.arrive(requests)
    return seen, without(world.tick(), "timer", "allocate")


@pytest.mark.parametrize(
    ("requests", "copies", "holders", "last"),
    [(3, 2, [[2]], "2:gpu,0:host>3,4"), (5, 2, [[2]], "2:gpu,0:host,1:host>3,4,5"), (3, 0, [[0]], "0:gpu>1,2")],
    ids=["host sources", "loads beside it", "gpu alone"],
)
def test_builders_see_the_sources_that_hold_the_model_on_the_gpu(
    requests: int, copies: int, holders: list[list[int]], last: str
) -> None:
    """Mutation: holders left out, or with them the sources in host memory."""
    seen, lines = seen_by_builders(requests, nodes=6, copies=copies, target=1)
    assert lines[-1].endswith(last)
    assert seen.holders == holders


@pytest.mark.parametrize(("slow", "rate"), [((), 3.2e9), ((2,), 0.8e9), ((0,), 0.8e9), ((5,), 3.2e9)])
def test_a_round_is_predicted_by_the_slowest_node_of_the_multicast(slow: tuple[int, ...], rate: float) -> None:
    """The largest block has 0.258 GB; node 5 takes no part. Mutation: every node taken for one of the ordinary kind."""
    overrides = (NodeOverride(nodes=slow, nic_bytes_per_s=1e9),) if slow else ()
    seen, lines = seen_by_builders(5, nodes=6, copies=0, cluster={"overrides": overrides})
    assert lines == ["multicast t2 0:gpu>1,2"]
    assert seen.round_s == [pytest.approx(1e-5 + 0.25819e9 / rate, rel=0.001)]


def test_loads_are_described_to_pipeline_builders_as_a_valid_plan() -> None:
    seen, lines = seen_by_builders(5, nodes=3, min_replicas=0)
    assert lines == [f"load t{node + 1} {node} ssd 0123" for node in range(3)]
    assert [plan.destinations for plan in seen.plans] == [(0, 1, 2)]
    validate_plan(seen.plans[0])
    assert len(seen.plans[0].rounds) == 4, "a block a round"


def test_loads_beside_a_multicast_are_counted_in_its_rounds() -> None:
    """PCIe is two and a half times as fast as the network. Mutation: rounds at the rate of the loads."""
    seen, lines = seen_by_builders(5, nodes=5, copies=2, cluster=FAST_PCIE)
    assert lines == ["load t2 1 host 0123", "multicast t3 0:gpu>2"]
    assert seen.round_s == [pytest.approx(1e-5 + 0.25819e9 / 3.2e9, rel=0.001)]
    received = {send.block: number for number, sends in enumerate(seen.plans[0].rounds, 1) for send in sends if send.dst == 1}
    assert [received[block] for block in seen.plans[0].orders[-1]] == [1, 1, 2, 2]


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
