"""Every invariant under seeded faults for parts and settings that the exploration itself does not draw.

Rules of autoscaling with bounds, the cheapest ways of KV and of leaving pipelines, standing trees, mixtures of parts, gradual
starts, plans of one block, empty workloads, arrivals at the same times, and nodes that die around the end of a multicast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lambdascale.control import Autoscaler, TurnAutoscaler
from lambdascale.control.autoscaler import PlannedAutoscaler
from lambdascale.control.start import (
    ByLocality,
    ByStartupTime,
    FasterWay,
    GpuAndHostSources,
    GpuSources,
    JoiningSources,
    MulticastStart,
    NoOwnCopies,
    OwnCopies,
    SparingCopies,
    StandingTree,
)
from lambdascale.core import traced
from lambdascale.explore.faults import Loss, Trigger
from lambdascale.explore.run import run
from lambdascale.explore.scenario import Scenario, draw
from lambdascale.pipelines import ComplementaryPipelines, FixedLengths, NoPipelines, PipelineBuilder
from lambdascale.testing.starts import CooperativeStart, SpreadStart


def bounded(scenario: Scenario, rng: Random) -> Scenario:
    """Fixed numbers of replicas, upper bounds, and the rules of the prototype's controller and plans."""
    drawn = scenario.system.autoscaler
    assert isinstance(drawn, Autoscaler)
    least = drawn.min_replicas
    common: dict[str, Any] = {
        "target_per_replica": drawn.target_per_replica,
        "keep_alive_s": drawn.keep_alive_s,
        "min_replicas": least,
        "max_replicas": rng.choice((None, max(1, least), max(1, least) + 1)),
    }
    rules: tuple[Callable[..., Autoscaler], ...] = (
        Autoscaler,
        TurnAutoscaler,
        lambda **fields: PlannedAutoscaler(burst_replicas=rng.choice((1, 3, 12)), **fields),
    )
    return replace(scenario, system=replace(scenario.system, autoscaler=rng.choice(rules)(**common)))


def cheapest(scenario: Scenario, rng: Random) -> Scenario:
    """Pipelines and KV by predictions, on every way that KV takes."""
    scenario = draw(scenario.seed, "lambdascale_tuned")
    start = scenario.system.start
    assert isinstance(start, MulticastStart)
    pipelines = ComplementaryPipelines(form=rng.choice(("always", "useful")), switch=rng.choice(("cheapest", "each")))
    cluster = replace(scenario.cluster, kv_path=rng.choice(("network", "messages")))
    if rng.random() < 0.4:
        places, size = rng.choice((1, 2, 8)), rng.choice((4096, 65536, 1 << 20))
        cluster = replace(cluster, kv_path="places", kv_places=places, kv_place_bytes=size)
    return replace(
        scenario, cluster=cluster, system=replace(scenario.system, start=replace(start, pipelines=pipelines), kv="cheapest")
    )


def mixed(scenario: Scenario, rng: Random) -> Scenario:
    """Any source rule with any rule for warm nodes, placement and builder."""
    start = draw(scenario.seed, "lambdascale").system.start
    assert isinstance(start, MulticastStart)
    builders: Sequence[PipelineBuilder] = (
        ComplementaryPipelines(switch="cheapest"),
        FixedLengths(lengths=(8, 4, 2), unit=rng.choice((1, 2))),
        NoPipelines(),
    )
    start = replace(
        start,
        source_rule=rng.choice((GpuSources(), JoiningSources(), StandingTree(), GpuAndHostSources())),
        warm=rng.choice((OwnCopies(), FasterWay(), NoOwnCopies())),
        placement=rng.choice((ByLocality(), SparingCopies(), ByStartupTime())),
        pipelines=rng.choice(builders),
    )
    return replace(scenario, system=replace(scenario.system, start=start))


def standing(scenario: Scenario, rng: Random) -> Scenario:
    """FaaSNet's tree over a model's life."""
    scenario = draw(scenario.seed, "faasnet")
    start = scenario.system.start
    assert isinstance(start, MulticastStart)
    return replace(scenario, system=replace(scenario.system, start=replace(start, source_rule=StandingTree())))


def gradual(scenario: Scenario, rng: Random) -> Scenario:
    """Start policies that change replicas while they start."""
    start = rng.choice((CooperativeStart(), SpreadStart(nodes=rng.randint(1, 4))))
    return replace(scenario, system=replace(scenario.system, start=start, kv=rng.choice(("copy", "cheapest"))))


def small(scenario: Scenario, rng: Random) -> Scenario:
    """One block, whole seconds between arrivals, and now and then no request at all."""
    requests = [
        traced(each.request_id, float(round(each.arrival_s)), each.model, each.request.prompt_tokens, each.output_tokens)
        for each in scenario.workload
    ]
    workload = () if rng.random() < 0.1 else tuple(sorted(requests, key=lambda each: (each.arrival_s, each.request_id)))
    return replace(scenario, system=replace(scenario.system, blocks=rng.choice((1, 1, 2))), workload=workload)


def dying(scenario: Scenario, rng: Random) -> Scenario:
    """Four more nodes die with a block, a mode switch or a release of theirs."""
    moments = ("BlockArrived", "SwitchMode", "StopInstance", "ReleaseNode", "Serve")
    deaths = tuple(
        Loss(
            when=Trigger(rng.choice(moments), rng.randint(1, 40)),
            pick=rng.randrange(8),
            near=True,
            noticed_s=rng.choice((0.0, 0.001, 0.3)),
            then=rng.choice(("back", "never", "given up")),
            back_s=rng.choice((0.0, 0.05)),
        )
        for _ in range(4)
    )
    return replace(scenario, faults=scenario.faults + deaths)


def together(scenario: Scenario, rng: Random) -> Scenario:
    """Several of these at once."""
    scenario = rng.choice((mixed, gradual, cheapest, standing))(scenario, rng)
    for vary in (bounded, small, dying):
        if rng.random() < 0.6:
            scenario = vary(scenario, rng)
    return scenario


def holds(vary: Callable[[Scenario, Random], Scenario], seed: int) -> None:
    scenario = vary(draw(seed), Random(f"{vary.__name__} {seed}"))
    outcome = run(scenario)
    assert not outcome.broken, f"{vary.__name__}, {scenario.summary}: {outcome}"


@pytest.mark.parametrize("vary", [bounded, cheapest, mixed, standing, gradual, small, dying, together])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=16)  # bounded: looks ended although a request behind the queue's head needed another node
@example(seed=234)  # bounded: fewer requests than a node runs at once waited for ever
@example(seed=289)  # bounded: a fixed number stayed exceeded
@example(seed=28)  # standing: the checker took a multicast for a second try
def test_every_invariant_holds_in_corners(vary: Callable[[Scenario, Random], Scenario], seed: int) -> None:
    holds(vary, seed)
