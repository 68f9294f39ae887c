"""Seams of the control plane, by two small systems in the simulator: moved boundaries, and nodes that hold a share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from lambdascale.control import Autoscaler, SystemConfig, build_system
from lambdascale.control.start import MulticastStart
from lambdascale.core import UserError, traced
from lambdascale.core.commands import LoadBlocks, ReleaseNode, Repartition, Serve, SwitchMode
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.testing.starts import CooperativeStart, SpreadStart, WithHolders
from lambdascale.testing.systems import SystemConformance, burst, small_cluster, small_model


@cache
def configured(*overrides: str) -> SystemConfig:
    """A system of frozen parts, composed once."""
    return build(compose(overrides)).system


def cooperative(**changes: object) -> SystemConfig:
    base = configured("system=lambdascale")
    return replace(base, name="cooperative", start=CooperativeStart(), kv="copy", **changes)


def spread(**changes: object) -> SystemConfig:
    base = configured("system=lambdascale", "system.memory.initial_copies=0")
    return replace(base, name="spread", start=SpreadStart(), kv="copy", **changes)


def with_holders() -> SystemConfig:
    base = configured("system=lambdascale", "system.kv=copy")
    assert isinstance(base.start, MulticastStart)
    return replace(base, name="with_holders", start=replace(base.start, pipelines=WithHolders()))


class TestCooperative(SystemConformance):
    def make_system(self) -> SystemConfig:
        return cooperative()


class TestSpread(SystemConformance):
    def make_system(self) -> SystemConfig:
        return spread()


class TestPipelinesWithHolders(SystemConformance):
    def make_system(self) -> SystemConfig:
        return with_holders()


class Suite(SystemConformance):
    def __init__(self, config: SystemConfig) -> None:
        self.config = config

    def make_system(self) -> SystemConfig:
        return self.config


def test_the_boundary_moves_with_every_block() -> None:
    """One source, one destination, 16 blocks: the destination's share grows block by block, then both serve alone."""
    _, recorder = Suite(cooperative()).run(burst(16), cluster=small_cluster(2), target_per_replica=8)
    entries = [entry for _, entry in recorder.entries]
    moves = [e for e in entries if isinstance(e, Repartition)]
    assert [m.stages[0].last_block for m in moves] == list(range(15))
    assert {m.stages[0].node for m in moves} == {1}, "the destination runs the first blocks"
    assert all(m.stages[1].node == 0 and m.stages[1].first_block == m.stages[0].last_block + 1 for m in moves)
    (switch,) = [e for e in entries if isinstance(e, SwitchMode)]
    homes = [target for _, target in switch.moves]
    assert abs(homes.count(min(homes)) - homes.count(max(homes))) <= 1, "the running requests are split evenly"


def test_a_cold_start_over_four_nodes_consolidates_onto_one() -> None:
    """Each of four nodes loads a quarter; the first then loads the rest, takes over, and the three others are released."""
    _, recorder = Suite(spread()).run([traced(0, 0.0, "small", 20, 400)], min_replicas=0, target_per_replica=4)
    entries = [entry for _, entry in recorder.entries]
    loads = [e for e in entries if isinstance(e, LoadBlocks)]
    assert [len(load.blocks) for load in loads] == [4, 4, 4, 4, 12]
    (serve,) = [e for e in entries if isinstance(e, Serve)]
    assert [(s.first_block, s.last_block) for s in serve.stages] == [(0, 3), (4, 7), (8, 11), (12, 15)]
    (moved,) = [e for e in entries if isinstance(e, Repartition)]
    assert [(s.node, s.first_block, s.last_block) for s in moved.stages] == [(serve.stages[0].node, 0, 15)]
    released = [e.node for e in entries if isinstance(e, ReleaseNode)]
    assert released[:3] == [s.node for s in serve.stages[1:]]
    assert not any(e.keep_host for e in entries if isinstance(e, ReleaseNode) and e.node in released[:3])


def test_a_source_serves_in_two_instances() -> None:
    """The source is a replica, and the second stage of a pipeline with its destination until that one is complete."""
    _, recorder = Suite(with_holders()).run(burst(40), cluster=small_cluster(3), target_per_replica=8)
    entries = [entry for _, entry in recorder.entries]
    pipelines = [e for e in entries if isinstance(e, Serve) and e.is_pipeline]
    replicas = {e.stages[0].node for e in entries if isinstance(e, Serve) and not e.is_pipeline}
    assert pipelines
    assert all(pipeline.stages[1].node in replicas for pipeline in pipelines)
    assert sum(isinstance(e, SwitchMode) for e in entries) == len(pipelines)


def test_an_idle_pipeline_is_scaled_in() -> None:
    """Four nodes with a quarter each serve to the end; idle for the keep-alive, all four are released, without host copies."""
    config = replace(spread(), start=SpreadStart(consolidate=False))
    _, recorder = Suite(config).run(burst(4), min_replicas=0, keep_alive_s=0.5, target_per_replica=8)
    (serve,) = [(at, e) for at, e in recorder.entries if isinstance(e, Serve)]
    released = [(at, e) for at, e in recorder.entries if isinstance(e, ReleaseNode)]
    assert {e.node for _, e in released} == {stage.node for stage in serve[1].stages}
    assert len({at for at, _ in released}) == 1, "together"
    assert not any(e.keep_host for _, e in released), "a share is no copy of the model"


def test_a_share_counts_as_a_part_of_a_replica() -> None:
    """Four nodes that hold a quarter each are one replica: the autoscaler starts no second one for the same load."""
    config = spread(autoscaler=Autoscaler(target_per_replica=8, min_replicas=0, interval_s=0.1))
    _, recorder = Suite(config).run(burst(4), cluster=small_cluster(8))
    serves = [e for _, e in recorder.entries if isinstance(e, Serve)]
    assert len(serves) == 1


@pytest.mark.parametrize("at_s", [0.1, 0.6, 1.2, 1.7, 2.0, 2.3, 3.0])
@pytest.mark.parametrize("node", [0, 1, 3])
def test_a_node_of_a_spread_replica_dies(node: int, at_s: float) -> None:
    """The others load what they lack, whether it dies while its share loads, while the pipeline serves, or later."""
    Suite(spread()).run(burst(12), failures=[(node, at_s)], min_replicas=0)


def test_storage_may_be_remote() -> None:
    """Nodes without a host copy load from the remote store, at its rate; a cluster without one is refused."""
    base = configured("system=serverlessllm", "system.start.storage=remote", "system.memory.initial_copies=0")
    with pytest.raises(UserError, match="remote_bytes_per_s=0"):
        build_system(base, cluster=small_cluster(), models=[small_model()])
    _, recorder = Suite(base).run(burst(30), cluster=replace(small_cluster(), remote_bytes_per_s=2e8), min_replicas=0)
    loads = [entry for _, entry in recorder.entries if isinstance(entry, LoadBlocks)]
    assert {load.tier for load in loads} == {"remote"}
    first = min(at for at, entry in recorder.entries if isinstance(entry, Serve))
    assert first == pytest.approx(5.0, rel=0.01), "a model of 1 GB at 0.2 GB/s"
