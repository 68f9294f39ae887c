"""Invariants after every event, however draining, closed pipelines, joined trees, losses and returns meet."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.control.state import ModelState
from lambdascale.core.events import NodeJoined
from lambdascale.testing.starts import CooperativeStart, SpreadStart
from tests.policy.world import World

NODES, MODELS = 6, "ab"
SYSTEMS = (
    ("lambdascale", {"form": "useful", "switch": "all"}),
    ("lambdascale", {"form": "useful", "switch": "each"}),
    ("lambdascale_tuned", {"form": "always", "switch": "each"}),
    ("lambdascale_tuned", {"form": "useful", "switch": "cheapest"}),
    ("faasnet", {}),
    ("nccl_broadcast", {}),
    ("serverlessllm", {}),
    ("ideal", {}),
    ("serverlessllm", {"start": SpreadStart()}),
    ("lambdascale", {"form": "always", "kv": "copy", "start": CooperativeStart()}),
)
STEPS = st.one_of(
    st.tuples(st.just("arrive"), st.sampled_from(MODELS), st.integers(1, 9)),
    st.tuples(st.just("finish"), st.just(""), st.integers(0, 9)),
    st.tuples(st.just("tick"), st.just(""), st.just(0)),
    st.tuples(st.just("wait"), st.just(""), st.integers(1, 40)),
    st.tuples(st.just("deliver"), st.just(""), st.integers(1, 9)),
    st.tuples(st.just("deliver"), st.just(""), st.integers(1, 9)),
    st.tuples(st.just("lose"), st.just(""), st.integers(0, NODES - 1)),
    st.tuples(st.just("join"), st.just(""), st.integers(0, NODES - 1)),
    st.tuples(st.just("fail"), st.just(""), st.integers(0, 9)),
)


def running(world: World) -> list[int]:
    return [r for state in world.plane.fleet.models.values() for i in state.instances.values() for r in i.outstanding]


def play(world: World, kind: str, model: str, number: int) -> None:
    known = world.plane.fleet.transfers  # one that has brought all cannot bring it again to a node that came back empty
    under_way = [name for name in world.open_transfers() if world.command(name).transfer_id in known]
    open_requests = running(world)
    if kind == "arrive":
        world.arrive(number, model, prompt=200)
    elif kind == "finish":
        for request in open_requests[:number]:
            if request in running(world):
                world.finish(request)
    elif kind == "tick" and world.ticking:
        world.tick()
    elif kind == "wait":
        world.at += 0.01 * number
    elif kind == "deliver" and under_way:
        world.deliver(under_way[number % len(under_way)], number)
    elif kind == "lose":
        world.lose(number)
    elif kind == "join":
        world.play(NodeJoined(world.at, number))
    elif kind == "fail" and under_way:
        world.fail(transfer=under_way[number % len(under_way)])


def check(world: World, state: ModelState) -> None:
    fleet = world.plane.fleet
    serving = [i for i in state.instances.values() if i.open]
    if state.queue:
        needed = state.queue[0].kv_tokens
        able = [i for i in serving if len(i.outstanding) < i.capacity and i.kv_tokens >= needed]
        assert not able, f"{len(state.queue)} requests wait beside instance {able[0]}"
    assert state.running == sum(len(i.outstanding) for i in state.instances.values())
    assert sum(i.draining for i in state.instances.values()) <= state.draining
    for instance in state.instances.values():
        assert instance.kv_tokens == min(state.kv_tokens[node] for node in instance.nodes)
        assert not instance.is_pipeline or not all(state.allocations[node].complete for node in instance.nodes)
    for node, allocation in state.allocations.items():
        assert node in fleet.gpus_free
        assert allocation.transfers == sum(allocation in transfer.held for transfer in fleet.transfers.values())
        waits = allocation.is_share and any(node in pending.plan.nodes for pending in state.pending)
        assert allocation.instances or allocation.incoming or waits, f"node {node} does not serve, and nothing is to come"
        assert allocation.wanted <= allocation.blocks or allocation.incoming, f"nothing brings node {node} what it lacks"
        assert set(allocation.instances) <= set(state.instances)


@settings(max_examples=100, deadline=None)
@given(
    system=st.sampled_from(SYSTEMS),
    gpus=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    copies=st.integers(0, 2),
    keep_alive_s=st.sampled_from([0.0, 0.3]),
    steps=st.lists(STEPS, min_size=20, max_size=60),
)
def test_nothing_waits_beside_free_room_and_nothing_is_left_behind(
    system: tuple[str, dict[str, Any]],
    gpus: tuple[int, int],
    copies: int,
    keep_alive_s: float,
    steps: list[tuple[str, str, int]],
) -> None:
    """No request waits while an open instance has room; every node serves or has blocks to come; records agree."""
    name, settings_ = system
    world = World(
        name,
        nodes=NODES,
        gpus=gpus[0],
        gpus_per_replica=gpus[1],
        models=MODELS,
        copies=copies,
        min_replicas=0,
        keep_alive_s=keep_alive_s,
        cluster={"nic_bytes_per_s": 1e9},
        **settings_,
    )
    for step in steps:
        play(world, *step)
        for state in world.plane.fleet.models.values():
            check(world, state)
