"""Account of what every node's ports have still to move, of all models together, and the decisions that follow from it."""

from __future__ import annotations

import pytest

from lambdascale.control.traffic import Port
from tests.policy.world import World, without

GB = 10**9
MODELS = "abcdefghijkl"


def left(world: World, *nodes: int) -> dict[int, tuple[float, ...]]:
    """GB (in quarters, a block each) that nodes have still to send, receive, move over PCIe and read from storage."""
    ports: tuple[Port, ...] = ("nic_out", "nic_in", "pcie", "storage")
    return {node: tuple(round(world.plane.fleet.traffic.left(node, port) * 4 / GB) / 4 for port in ports) for node in nodes}


@pytest.mark.parametrize("system", ["lambdascale_tuned", "faasnet"])
def test_no_source_feeds_two_multicasts_while_another_is_idle(system: str) -> None:
    """Twelve models at once, all in the host memory of all nodes. Mutation: a source's load counted per model."""
    world = World(system, nodes=12, models=MODELS, copies=12, min_replicas=0, cluster={"host_memory_bytes": 12 * GB})
    for model in MODELS:
        world.arrive(1, model)
    multicasts = [line.split()[2] for line in world.tick() if line.startswith("multicast")]
    assert multicasts[:4] == ["1:host>0", "0:host>2b", "2:host>3c", "3:host>4d"]
    sources = [multicast.split(":")[0] for multicast in multicasts]
    assert sorted(map(int, sources)) == list(range(12)), "each of twelve nodes feeds one"


def test_a_source_that_sends_another_model_is_waited_for() -> None:
    """Node 0 holds the only copies of a and d. Mutation: a busy source taken."""
    world = World(nodes=3, models="abcd", copies=1, min_replicas=0)
    assert world.start == ["place 0", "place 1b", "place 2c", "place 0d"]
    world.arrive(1, "a")
    world.arrive(1, "d")
    assert world.tick() == ["allocate 1", "multicast t1 0:host>1", "timer 0.1"]
    assert world.deliver("t1", 3) == []
    assert world.tick() == ["timer 0.2"], "a block is still to be sent"
    world.deliver("t1")
    assert without(world.tick(), "timer") == ["allocate 2d", "multicast t2 0:host>2d"]


def test_a_multicast_counts_at_those_who_send_and_receive_until_its_blocks_arrive() -> None:
    """FaaSNet's tree from 0: 1 and 2 are its children, and 3 is 1's."""
    world = World("faasnet", nodes=4)
    world.arrive(8)
    assert world.tick()[-2] == "multicast t2 0:gpu>1,2,3"
    assert left(world, 0, 1, 2, 3) == {0: (2, 0, 0, 0), 1: (1, 1, 0, 0), 2: (0, 1, 0, 0), 3: (0, 1, 0, 0)}
    world.block(1, 0)
    assert left(world, 0, 1, 3) == {0: (1.75, 0, 0, 0), 1: (1, 0.75, 0, 0), 3: (0, 1, 0, 0)}
    world.block(3, 0)
    assert left(world, 0, 1, 3) == {0: (1.75, 0, 0, 0), 1: (0.75, 0.75, 0, 0), 3: (0, 0.75, 0, 0)}
    world.deliver("t2")
    assert left(world, 0, 1, 2, 3) == dict.fromkeys(range(4), (0, 0, 0, 0))


def test_host_copies_cross_pcie_on_their_way() -> None:
    world = World(nodes=3, copies=1, min_replicas=0)
    world.arrive(2)
    world.tick()
    assert left(world, 0, 1) == {0: (1, 0, 1, 0), 1: (0, 1, 0, 0)}
    world.block(1, 0)
    assert left(world, 0, 1) == {0: (0.75, 0, 0.75, 0), 1: (0, 0.75, 0, 0)}


@pytest.mark.parametrize(("copies", "first"), [(1, (0, 0, 1, 0)), (0, (0, 0, 1, 1))])
def test_loads_cross_pcie_and_cold_ones_the_storage_too(copies: int, first: tuple[float, ...]) -> None:
    world = World("serverlessllm", nodes=1, copies=copies, min_replicas=0)
    world.arrive(1)
    world.tick()
    assert left(world, 0) == {0: first}
    world.block(0, 0, 1)
    assert left(world, 0) == {0: tuple(gigabytes / 2 for gigabytes in first)}


def test_what_a_run_starts_with_moves_nothing() -> None:
    assert left(World("ideal", nodes=2, min_replicas=2), 0, 1) == dict.fromkeys(range(2), (0, 0, 0, 0))


def test_a_multicast_that_is_called_off_leaves_nothing_behind() -> None:
    """Mutation: a cancelled transfer's blocks stay on the account. What replaces the multicast is all that counts."""
    world = World("faasnet", nodes=4)
    world.arrive(8)
    world.tick()
    assert world.lose(1)[:2] == ["cancel t2", "multicast t3 0:gpu>2,3"]
    assert sum(sent for sent, *_ in left(world, 0, 1, 2, 3).values()) == 2
    assert left(world, 1) == {1: (0, 0, 0, 0)}
    assert [line.split()[0] for line in world.lose(0)[:4]] == ["cancel", "stop", "load", "load"]
    assert left(world, 0, 1, 2, 3) == {0: (0, 0, 0, 0), 1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 3: (0, 0, 1, 1)}


def test_the_startup_estimate_counts_remaining_bytes() -> None:
    """ServerlessLLM: of two nodes that load, the one that is nearly done is taken. Mutation: whole models counted."""
    world = World("serverlessllm", nodes=2, gpus=2, models="abc", min_replicas=0)
    world.arrive(1, "a")
    world.arrive(1, "b")
    assert without(world.tick(), "timer", "load") == ["allocate 0", "allocate 1b"]
    world.block(1, 0, 1, 2, model="b")
    world.arrive(1, "c")
    assert without(world.tick(), "timer", "load") == ["allocate 1c"]
