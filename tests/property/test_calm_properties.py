"""Looks that are known to decide nothing (Calm) would decide nothing: commands are the same with and without them."""

from __future__ import annotations

from collections import deque
from math import inf
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.control.scale_in import ScaleIn
from lambdascale.core import Request
from lambdascale.core.events import NodeJoined
from tests.policy.world import World

NODES, MODELS = 5, "ab"
SYSTEMS = ("lambdascale", "lambdascale_tuned", "nccl_broadcast", "ideal")
KINDS = st.sampled_from(["arrive", "arrive", "finish", "finish", "finish all", "deliver", "deliver", "lose", "join", ""])
# An event, its model, its number, and the ticks after it.
STEPS = st.tuples(KINDS, st.sampled_from(MODELS), st.integers(1, 6), st.integers(0, 12))


def play(world: World, kind: str, model: str, number: int) -> list[str]:
    """Play a step; return the commands."""
    under_way = world.open_transfers()
    running = sorted(request for instance in world.plane.fleet.instances.values() for request in instance.outstanding)
    if kind == "arrive":
        return world.arrive(number, model)
    if kind == "finish" and running:
        return world.finish(running[number % len(running)])
    if kind == "finish all":
        return world.finish(*running)
    if kind == "deliver" and under_way:
        return world.deliver(under_way[number % len(under_way)], number)
    if kind == "lose":
        return world.lose(number % NODES)
    if kind == "join":
        return world.play(NodeJoined(world.at, number % NODES))
    return []


@settings(max_examples=150, deadline=None)
@given(
    system=st.sampled_from(SYSTEMS),
    models=st.sampled_from(["a", MODELS]),
    least=st.integers(0, 2),
    keep_alive_s=st.sampled_from([0.0, 0.35, 1.0]),
    max_batch=st.sampled_from([2, 5]),
    steps=st.lists(STEPS, max_size=20),
)
def test_calm_looks_decide_nothing(
    system: str, models: str, least: int, keep_alive_s: float, max_batch: int, steps: list[tuple[str, str, int, int]]
) -> None:
    """Mutations: calm beyond an idle time; calm whatever the queue, the load, the peak, what is drained or the replicas."""
    quick, full = (
        World(system, nodes=NODES, models=models, min_replicas=least, keep_alive_s=keep_alive_s, max_batch=max_batch)
        for _ in range(2)
    )
    for kind, model, number, ticks in steps:
        step = (kind, model if model in models else "a", number)
        lines = play(quick, *step) + _ticked(quick, ticks)
        with patch.object(ScaleIn, "_calm_down"):
            assert play(full, *step) + _ticked(full, ticks) == lines, step


def _ticked(world: World, ticks: int) -> list[str]:
    return [line for _ in range(ticks) if world.ticking for line in world.tick()]


@settings(max_examples=200, deadline=None)
@given(
    keep_alive_s=st.sampled_from([0.0, 0.35, 1.0]),
    loads=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2), st.integers(0, 3)), max_size=25),
)
def test_the_peak_is_the_highest_load_of_all_looks_that_count(keep_alive_s: float, loads: list[tuple[int, int, int]]) -> None:
    """Looks at an unchanged load are not recorded one by one. Of equal loads the last one counts.

    Mutations: a load counts from its first look on, or until the next change; the highest is forgotten with a lower one.
    """
    world = World(keep_alive_s=keep_alive_s)
    scale_in, fleet = world.plane._scale_in, world.plane.fleet
    (state,) = fleet.models.values()
    looks: list[tuple[float, int, int]] = []
    for ticks, queued, running in loads:
        state.queue, state.running = deque([Request(0, 0.0, "a", 1, 1)] * queued), running
        for _ in range(ticks):
            fleet.at += 0.1
            looks.append((fleet.at, queued, running))
            scale_in.is_calm(state)
            recent = [look[1:] for look in looks if look[0] >= fleet.at - keep_alive_s - 1e-9]
            assert state.looks[0][1:] == max(reversed(recent), key=sum)


@pytest.mark.parametrize(
    "field", ["until", "queued", "running", "peak_queued", "peak_running", "allocations", "spared", "draining"]
)
def test_everything_that_calm_depends_on_is_compared(field: str) -> None:
    world = World(min_replicas=1)
    world.arrive(2)
    world.tick()
    scale_in, (state,) = world.plane._scale_in, world.plane.fleet.models.values()
    assert scale_in.is_calm(state)
    calm = state.calm
    if field == "draining":
        state.draining = 1
    elif field == "until":  # and the peak does not want all that serve
        calm.until, calm.serving = world.at - 0.01, inf
    elif field in ("queued", "running"):  # and the load wants more than enough
        setattr(calm, field, getattr(calm, field) - 1)
        calm.enough = 0
    else:
        setattr(calm, field, getattr(calm, field) + 1)
        calm.serving = inf
    assert not scale_in.is_calm(state)


@pytest.mark.parametrize("field", ["", "empty", "count", "instances"])
def test_looks_are_calm_while_drained_replicas_have_requests(field: str) -> None:
    """Else nothing would spare them while a replica drains; an empty one is released, and others may serve again."""
    world = World(min_replicas=2, keep_alive_s=0.0)
    world.arrive(4)
    world.tick()
    scale_in, (state,) = world.plane._scale_in, world.plane.fleet.models.values()
    drained = max(state.instances.values(), key=lambda instance: len(instance.outstanding))
    drained.draining, state.draining, state.calm.draining, state.calm.instances = True, 1, 1, len(state.instances)
    if field == "empty":
        drained.outstanding.clear()
    elif field == "count":
        state.draining = 2
    elif field == "instances":
        state.calm.instances += 1
    assert scale_in._is_draining(state) is scale_in.is_calm(state) is (field == "")


@pytest.mark.parametrize("keep_alive_s", [0.0, 1.0])
def test_looks_at_a_steady_load_are_calm(keep_alive_s: float) -> None:
    """Else the property above would say nothing; a load that wants more ends it, beside what is known of a lower one."""
    world = World(min_replicas=2, keep_alive_s=keep_alive_s, max_batch=5)
    world.arrive(3)
    scale_in, (state,) = world.plane._scale_in, world.plane.fleet.models.values()
    assert not scale_in.is_calm(state)
    world.tick()
    assert scale_in.is_calm(state)
    for _ in range(2):
        world.arrive(1)
        assert scale_in.is_calm(state) is (state.running == 4)
