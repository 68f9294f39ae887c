"""Starts on nodes whose GPUs have room for a replica's KV and no more: uneven stages, and pipelines that are still there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import OutOfMemoryError

from lambdascale.core import Stage
from lambdascale.core.commands import KvPolicy
from lambdascale.inference import BlockStore, StoreConfig
from lambdascale.live.node import runners
from lambdascale.live.node_memory import batch_slots
from tests.node.fakes import LAYERS, SLOT_TOKENS, FakeCluster, move_to_replicas, replica, run_until_tokens, stages
from tests.unit.node_doubles import pack_tiny

HALVES = stages((0, 0, 1), (1, 2, 3))


def tight(nodes: int, max_batch: int = 2) -> FakeCluster:
    """Every node has room for the slots of one replica, as the control plane is told, and reserves them when it starts."""
    cluster = FakeCluster(nodes, max_batch, kv_tokens=max_batch * SLOT_TOKENS)
    for executor in cluster.executors:
        executor.room, executor.reserves = max_batch * LAYERS, True
    return cluster


@pytest.mark.parametrize(
    ("most", "kv_tokens", "layers", "slots"),
    [
        (8, 4096, [16], 8),
        (8, 4096, [8, 8], 8),
        (8, 4096, [7, 9], 7),
        (8, 4607, [7, 9], 7),
        (8, 4608, [7, 9], 8),
        (8, 99_999, [1, 15], 8),
        (8, 4096, [1, 15], 4),
        (8, 4096, [13, 1, 1, 1], 2),
        (1, 512, [1, 15], 1),
    ],
    ids=str,
)
def test_slots_of_a_batch(most: int, kv_tokens: int, layers: list[int], slots: int) -> None:
    """Nodes with nine of 16 layers in a pipeline of two keep an eighth more KV than a replica does; one slot is the least."""
    assert batch_slots(most, kv_tokens, 512, layers) == slots
    if slots > 1:
        assert all(len(layers) * slots * 512 * own <= kv_tokens * 16 for own in layers)


@pytest.mark.parametrize("uneven", [stages((0, 0, 2), (1, 3, 3)), stages((0, 0, 0), (1, 1, 1), (0, 2, 3))], ids=["cut", "twice"])
def test_a_pipeline_of_uneven_stages_has_fewer_slots(uneven: tuple[Stage, ...]) -> None:
    """One slot for each of two batches on a node with six of eight layers: the others wait. A replica has both slots."""
    cluster = tight(2)
    cluster.serve(1, *uneven)
    cluster.assign(1, 0, 1, 2, 3, 4, 5)
    cluster.run()
    cluster.check()
    assert {runner.slots for executor in cluster.executors for runner in executor.made} == {2}
    cluster.stop(1, 0, 1)
    cluster.serve(2, *stages(replica(1)))
    cluster.run()
    assert cluster.executors[1].open[0].slots == 2


def test_memory_that_is_not_reserved_has_all_slots() -> None:
    """The budget of tokens holds it down."""
    cluster = tight(2)
    for executor in cluster.executors:
        executor.room, executor.reserves = 1 << 30, False
    cluster.serve(1, *stages((0, 0, 2), (1, 3, 3)))
    cluster.run()
    assert {runner.slots for executor in cluster.executors for runner in executor.made} == {4}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["copy", "recompute"]), st.integers(0, 60), st.randoms(use_true_random=False))
def test_new_stages_keep_the_slots_of_the_first(kv: KvPolicy, moment: int, rng: random.Random) -> None:
    """A node that joins later numbers them alike; a runner of theirs fits beside the one before, since stages are small."""
    cluster = tight(3, max_batch=4)
    cluster.serve(1, *stages((0, 0, 2), (1, 3, 3)))
    cluster.assign(1, 0, 1, 2, 3, 4, 5)
    cluster.run(rng, steps=moment)
    cluster.repartition(1, 1, 0, [0, 1, 2], 2, kv, *stages((2, 0, 0), (1, 1, 3)))
    cluster.run(rng)
    cluster.check()
    assert {executor.made[-1].slots for executor in cluster.executors} == {4}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["copy", "recompute"]), st.integers(0, 60), st.randoms(use_true_random=False))
def test_a_replica_waits_for_the_memory_of_its_node_s_pipeline(kv: KvPolicy, moment: int, rng: random.Random) -> None:
    """A mode switch reserves KV twice for a moment. Such starts failed, and the third cost the node and its requests."""
    cluster = tight(3)
    cluster.serve(1, *stages((0, 0, 0), (1, 1, 2), (2, 3, 3)))
    cluster.assign(1, 0, 1, 2, 3, 4)
    cluster.run(rng, steps=moment)
    move_to_replicas(cluster, kv)
    cluster.run(rng)
    cluster.check()
    assert [len(executor.open) for executor in cluster.executors] == [1, 1, 0]
    assert not any(node._early for node in cluster.nodes)


def test_memory_comes_when_the_node_that_was_to_take_kv_is_lost() -> None:
    """Nothing else happens on the node whose replica waits: the lost one grants no places any more."""
    cluster = tight(3)
    cluster.serve(1, *HALVES)
    cluster.assign(1, 0, 1)
    run_until_tokens(cluster, 2)
    cluster.serve(2, *stages(replica(0)))
    cluster.serve(3, *stages(replica(2)))
    cluster.switch(1, 0, [(1, 3)], {3: 2}, "copy")
    while others := [choice for choice in cluster.choices() if choice not in (("deliver", 0, 2), ("deliver", 1, 2))]:
        cluster.happen(others[0])
    assert set(cluster.nodes[0]._instances) == set()
    cluster.dead.add(2)
    cluster.nodes[0].lost(2)
    cluster.run()
    assert set(cluster.nodes[0]._instances) == {2}


def waiting() -> FakeCluster:
    """A pipeline on nodes 0 and 1, and another, led by node 1, that waits for its memory with two requests."""
    cluster = tight(2)
    cluster.serve(1, *HALVES)
    cluster.run()
    cluster.serve(2, *stages((1, 0, 1), (0, 2, 3)))
    cluster.assign(2, 1, 1, 2)
    cluster.run()
    assert cluster.failures() == []
    assert [set(node._instances) for node in cluster.nodes] == [{1}, {1}]
    return cluster


def test_a_pipeline_waits_for_the_one_before() -> None:
    cluster = waiting()
    cluster.stop(1, 0, 1)
    cluster.run()
    cluster.check()


@pytest.mark.parametrize("change", ["switch", "stages"])
def test_an_instance_that_changes_before_it_has_had_room_fails(change: str) -> None:
    """No batch has its requests yet: the controller looks after them (see Answers)."""
    cluster = waiting()
    if change == "switch":
        cluster.switch(2, 1, [(1, 3), (2, 3)], {3: 1}, "copy")
    else:
        cluster.repartition(2, 1, 1, [1], 2, "copy", *stages(replica(1)))
    cluster.run()
    assert [(failure.instance, "no room to start" in failure.reason) for failure in cluster.failures()] == [(2, True)]
    assert cluster.nodes[1]._early == {}
    cluster.stop(1, 0, 1)
    cluster.run()
    assert 2 not in cluster.nodes[1]._instances


@pytest.mark.parametrize("end", ["stopped", "head lost"])
def test_an_instance_that_ends_while_it_waits_does_not_start(end: str) -> None:
    cluster = waiting()
    if end == "stopped":
        cluster.stop(2, 0, 1)
    else:
        cluster.dead.add(1)
        cluster.nodes[0].lost(1)
    cluster.run()
    cluster.stop(1, 0, 1)
    cluster.run()
    assert cluster.nodes[0]._instances == {}
    assert cluster.executors[0].open == []
    assert cluster.failures() == []


def test_a_stage_without_room_gives_its_weights_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evict works while the error is kept, as a future keeps it."""
    model = pack_tiny(tmp_path)

    def full(*_: object) -> None:
        raise OutOfMemoryError("no room")

    monkeypatch.setattr(runners, "TransformerStage", full)
    size = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
    with BlockStore(StoreConfig(host_bytes=0, device_bytes=size, readers=1)) as store:
        store.add(model)
        store.load(model.name, range(len(model.blocks)), keep_host=False).wait(30)
        executor = runners.TorchExecutor(store, 16)
        with pytest.raises(OutOfMemoryError) as kept:
            executor.runner(model.name, 0, 1, 2)
        assert store.evict(model.name, "gpu") > 0
        assert kept.value.__traceback__ is not None
        assert not executor.reserves


def test_a_start_fails_when_no_memory_will_come() -> None:
    """A replica stays: nobody waits for it."""
    cluster = tight(1)
    cluster.serve(1, *stages(replica(0)))
    cluster.serve(2, *stages(replica(0)))
    cluster.run()
    assert [failure.instance for failure in cluster.failures()] == [2]
    assert len(cluster.executors[0].open) == 1


def test_a_start_that_fails_again_is_reported() -> None:
    """The pipeline's memory was not enough."""
    cluster = waiting()
    for executor in cluster.executors:
        executor.room = 1
    cluster.stop(1, 0, 1)
    cluster.run()
    assert sorted(failure.instance for failure in cluster.failures()) == [2, 2]
