"""Parts that stand for what the originals of the baselines do, and for its bounds."""

from __future__ import annotations

import pytest

from lambdascale.control import PlannedAutoscaler
from lambdascale.control.start import FreeMigration
from lambdascale.core import UserError
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.multicast import BinomialPipeline
from lambdascale.pipelines import FixedLengths, validate_pipeline
from tests.policy.world import World, without


@pytest.mark.parametrize(
    ("replicas", "requests", "expected"),
    [
        (1, 5, ["allocate 1", "allocate 2", "multicast t2 0:gpu>1,2"]),
        (2, 7, ["allocate 2", "allocate 3", "multicast t3 0:gpu,1:gpu>2,3"]),
        (3, 9, ["allocate 3", "allocate 4", "multicast t4 1:gpu>3,4"]),
        (3, 11, ["allocate 3", "allocate 4", "allocate 5", "multicast t4 1:gpu,2:gpu>3,4,5"]),
    ],
)
def test_new_nodes_take_the_next_places_of_a_standing_tree(replicas: int, requests: int, expected: list[str]) -> None:
    """Node 0 of 0, 1 and 2 has its two children, 1 and 2; 3 and 4 are children of 1, 5 is one of 2.

    Mutations: the root at work as long as it is idle; a parent too many or too few.
    """
    world = World("faasnet", nodes=8, min_replicas=replicas, source_rule="StandingTree")
    world.arrive(requests)
    assert without(world.tick(), "timer") == expected


def test_a_node_that_still_receives_has_its_place_in_the_standing_tree() -> None:
    """Mutation: only complete nodes count, so that node 0 would feed 3, too."""
    world = World("faasnet", nodes=8, source_rule="StandingTree")
    world.arrive(5)
    world.tick()
    world.arrive(2)
    assert without(world.tick(), "timer") == ["allocate 3", "multicast t3 1:gpu>3"]


def test_a_standing_tree_without_replicas_begins_at_a_host_copy() -> None:
    world = World("faasnet", nodes=4, copies=1, min_replicas=0, source_rule="StandingTree")
    world.arrive(3)
    assert without(world.tick(), "timer") == ["allocate 1", "allocate 2", "multicast t1 0:host>1,2"]


@pytest.mark.parametrize(("start", "tier"), [(None, "ssd"), (FreeMigration(), "host")], ids=["as it is", "bound"])
def test_a_copy_on_a_node_that_is_busy_with_another_model_is_read_once(start: FreeMigration | None, tier: str) -> None:
    """Node 0 has a copy of a and serves b. Mutations: the copy counts for every new node; a copy on a free node counts, too."""
    world = World("serverlessllm", nodes=3, models="ab", copies=1, min_replicas=0, max_replicas=2, start=start)
    world.lose(1)
    world.arrive(1, "b")
    world.tick()
    assert world.plane.fleet.gpus_free[0] == 0, "the node that is busy with b"
    world.arrive(3, "a")
    assert [line for line in world.tick() if line.startswith("load")] == [f"load t2 2 {tier} 0123"]


def test_migration_gives_nothing_to_a_single_model() -> None:
    found = []
    for start in (None, FreeMigration()):
        world = World("serverlessllm", nodes=4, copies=2, start=start)
        world.arrive(7)
        found.append(world.tick())
    assert found[0] == found[1]


def test_a_bound_is_simulated_only() -> None:
    target = "system.start._target_=lambdascale.control.start.FreeMigration"
    with pytest.raises(UserError, match="FreeMigration, a bound that is simulated only"):
        build(compose(["system=serverlessllm", "backend=live", "model=smollm2", "cluster=desk", target]))


@pytest.mark.parametrize("blocks", [16, 7])
@pytest.mark.parametrize("sources", [2, 4])
def test_stages_are_made_of_execution_blocks(blocks: int, sources: int) -> None:
    """Mutations: a pair counts as there when its first block is; the last block of an odd number lost."""
    plan = BinomialPipeline(chunks="round_robin").plan(sources=sources, destinations=8, blocks=blocks)
    pipelines = FixedLengths(lengths=(4, 2), unit=2).pipelines(plan)
    assert pipelines
    for pipeline in pipelines:
        validate_pipeline(plan, pipeline)
        assert all(stage.first_block % 2 == 0 for stage in pipeline.stages)
    single = FixedLengths(lengths=(4, 2)).pipelines(plan)
    assert min(p.ready_round for p in pipelines) >= min(p.ready_round for p in single)


def test_pipelines_are_no_longer_than_the_execution_blocks() -> None:
    plan = BinomialPipeline().plan(sources=2, destinations=8, blocks=4)
    assert [len(p.nodes) for p in FixedLengths(unit=2).pipelines(plan)] == [2] * 4
    with pytest.raises(UserError, match=r"pipelines\.unit must be at least 1, not 0"):
        FixedLengths(unit=0)


@pytest.mark.parametrize(("queued", "running", "wanted"), [(0, 0, 1), (0, 3, 3), (1, 0, 6), (9, 0, 9), (1, 9, 10)])
def test_a_scale_out_plan_holds_while_requests_wait(queued: int, running: int, wanted: int) -> None:
    plan = PlannedAutoscaler(target_per_replica=1, burst_replicas=6)
    assert plan.desired(queued, running) == wanted
    assert PlannedAutoscaler(target_per_replica=1, burst_replicas=6, max_replicas=4).desired(queued, running) == min(wanted, 4)


def test_a_plan_of_no_replicas_is_refused() -> None:
    with pytest.raises(UserError, match=r"autoscaler\.burst_replicas must be at least 1, not 0"):
        PlannedAutoscaler(burst_replicas=0)
