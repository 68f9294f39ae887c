"""Scenarios: a small cluster, models, a workload and faults, all drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any, Literal

from lambdascale.control import Autoscaler, BatchLimits, SystemConfig
from lambdascale.control.start import MulticastStart
from lambdascale.core import ClusterSpec, ModelSpec, TracedRequest, traced
from lambdascale.core.plan import FormRule, SwitchRule
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import choosing, compose, names
from lambdascale.explore.faults import (
    AnyFault,
    BadNode,
    Broken,
    Burst,
    ClockStep,
    Cut,
    Late,
    Loss,
    Pause,
    Poison,
    Repeat,
    Slow,
    Trigger,
)
from lambdascale.memory import HostCacheConfig
from lambdascale.pipelines import ComplementaryPipelines
from lambdascale.testing.systems import small_cluster, small_model, with_kv_tokens

# Larger clusters, in which more happens, are drawn more often, and so are the systems with pipelines.
_NODES = (1, 2, 3, 4, 4, 8, 8, 8)
_BLOCKS = (1, 2, 3, 4, 8)
_BATCHING = (
    BatchLimits(max_batch=8),
    BatchLimits(max_batch=2),
    BatchLimits(mode="static", max_batch=1),
    BatchLimits(mode="static", max_batch=4),
)
_KINDS = (
    *("loss", "loss", "loss", "loss", "slow", "slow", "late", "late", "pause", "repeat"),
    *("broken", "broken", "poison", "bad node", "clock", "burst", "burst"),
)
_FORMS: tuple[FormRule, ...] = ("always", "useful")
_SWITCHES: tuple[SwitchRule, ...] = ("all", "each")
_ENDS: tuple[Literal["back", "given up", "never"], ...] = ("back", "back", "given up", "never")
# What faults are tied to, with the largest number of it that is drawn: every phase of a scale-out and of a scale-in.
_MOMENTS = (
    ("Event", 300),
    ("BlockArrived", 40),
    ("BlockArrived", 40),
    ("StartMulticast", 2),
    ("StartMulticast", 2),
    ("LoadBlocks", 6),
    ("Serve", 8),
    ("Dispatch", 30),
    ("SwitchMode", 2),
    ("StopInstance", 4),
    ("ReleaseNode", 4),
    ("AllocateNode", 8),
    ("CancelTransfer", 1),
    ("RequestFinished", 20),
    ("TimerFired", 20),
    ("NodeLost", 1),
    ("NodeJoined", 10),
)
_BREAKABLE = (
    ("StartMulticast", 2),
    ("StartMulticast", 2),
    ("LoadBlocks", 6),
    ("Serve", 8),
    ("Dispatch", 20),
    ("SwitchMode", 1),
)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """All that a run depends on; ``faults`` may be left out one by one."""

    seed: int
    preset: str
    system: SystemConfig
    cluster: ClusterSpec
    models: tuple[ModelSpec, ...]
    workload: tuple[TracedRequest, ...]
    faults: tuple[AnyFault, ...]

    def only(self, kept: Sequence[int]) -> Scenario:
        """Return the scenario with the faults of these indices alone."""
        return replace(self, faults=tuple(self.faults[index] for index in kept))

    @property
    def requests(self) -> list[TracedRequest]:
        """Requests of the workload and of the bursts, by arrival."""
        found = list(self.workload)
        for index, fault in enumerate(self.faults):
            if isinstance(fault, Burst):
                model = self.models[fault.pick % len(self.models)].name
                first = 100_000 * (index + 1)
                found += [
                    traced(first + i, fault.at_s, model, 10 + 13 * (i % 7), 1 + 9 * (i % 5), 60) for i in range(fault.count)
                ]
        return sorted(found, key=lambda request: (request.arrival_s, request.request_id))

    @property
    def summary(self) -> str:
        """The scenario in one line."""
        limits, autoscaler, memory = self.system.batching, self.system.autoscaler, self.system.memory
        kv = sorted({self.cluster.node(node).kv_tokens(self.models[0]) for node in range(self.cluster.nodes)})
        return (
            f"seed {self.seed}: {self.preset}, {self.cluster.nodes} nodes of {self.cluster.gpus_per_node} GPUs, "
            f"{len(self.models)} models of {self.system.blocks} blocks on {self.models[0].gpus_per_replica} GPUs, {limits.mode} "
            f"batches of {limits.max_batch}, at least {autoscaler.min_replicas} replicas, keep-alive "
            f"{autoscaler.keep_alive_s:g} s, KV of "
            f"{' or '.join(map(str, kv))} tokens, {memory}, {len(self.requests)} requests"
        )


@lru_cache(maxsize=64)
def preset(name: str) -> SystemConfig:
    """Return a system of conf/system, or of a YAML file; UserError if ``name`` is neither."""
    with choosing("system", name) as chosen:
        return build(compose(chosen)).system


@lru_cache(maxsize=1)
def presets() -> tuple[str, ...]:
    """Return the names of the systems of conf/system."""
    return tuple(names("system"))


def draw(seed: int, system: str | None = None) -> Scenario:
    """Return the scenario of a seed; ``system``: of conf/system or a YAML file, instead of the one the seed chooses."""
    rng = Random(seed)
    with_pipelines = [each for each in presets() if each.startswith("lambdascale")]
    chosen = rng.choice(with_pipelines if rng.random() < 0.4 else presets())
    name = system or chosen
    nodes = rng.choice(_NODES)
    gpus = rng.choice((1, 1, 2))
    needed = rng.randint(1, gpus)
    models = _models(rng, needed)
    slots = nodes * (gpus // needed)
    cluster = _cluster(rng, nodes, gpus, models[0])
    config = _system(rng, preset(name), most=min(nodes, slots // len(models)))
    workload = _workload(rng, models)
    return Scenario(
        seed=seed,
        preset=name,
        system=config,
        cluster=cluster,
        models=models,
        workload=workload,
        faults=_faults(rng, nodes) + _cuts(Random(f"cuts of {seed}"), nodes),
    )


def _models(rng: Random, gpus: int) -> tuple[ModelSpec, ...]:
    count = rng.choice((1, 1, 1, 2, 2, 3, 4))
    return tuple(replace(small_model(f"m{index}"), gpus_per_replica=gpus) for index in range(count))


def _cluster(rng: Random, nodes: int, gpus: int, model: ModelSpec) -> ClusterSpec:
    """A small cluster, with scarce KV memory on no node, on some or on all."""
    cluster = small_cluster(nodes, gpus)
    tokens, kind = rng.choice((130, 200, 400)), rng.random()
    if kind < 0.25:
        cluster = with_kv_tokens(cluster, tokens, model=model)
    elif kind < 0.5 and nodes > 1:
        some = sorted(rng.sample(range(nodes), rng.randint(1, nodes - 1)))
        cluster = with_kv_tokens(cluster, tokens, some, model)
    pcie, memory = rng.choice(("2GB/s", "8GB/s")), rng.choice(("3GB", "1GB", "0.5GB"))
    return replace(cluster, name="explored", pcie_bytes_per_s=pcie, host_memory_bytes=memory)


def _system(rng: Random, config: SystemConfig, most: int) -> SystemConfig:
    autoscaler, start = config.autoscaler, config.start
    assert isinstance(autoscaler, Autoscaler), "every system of conf/ has it"
    autoscaler = replace(
        autoscaler,
        target_per_replica=rng.choice((1, 1, 2, 4)),
        keep_alive_s=rng.choice((0.0, 0.5, 1.0)),
        min_replicas=rng.randint(0, min(most, 2)),
        max_replicas=None,
    )
    memory = HostCacheConfig(
        budget=None,
        keep_alive_s=rng.choice((None, 15.0, 1.0, 0.0)),
        initial_copies=rng.randint(0, 2),
        enabled=rng.random() < 0.9,
    )
    batching = replace(rng.choice(_BATCHING), max_tokens=rng.choice((64, 4096)))
    form, switch = rng.choice(_FORMS), rng.choice(_SWITCHES)
    if isinstance(start, MulticastStart) and isinstance(start.pipelines, ComplementaryPipelines):
        start = replace(start, pipelines=replace(start.pipelines, form=form, switch=switch))
    changes: dict[str, Any] = {"kv": rng.choice(("recompute", "copy")), "blocks": rng.choice(_BLOCKS)}
    return replace(config, autoscaler=autoscaler, memory=memory, batching=batching, start=start, **changes)


def _workload(rng: Random, models: Sequence[ModelSpec]) -> tuple[TracedRequest, ...]:
    """Waves of requests, some of which only nodes with much KV memory can hold, and some that nothing can."""
    found: list[TracedRequest] = []
    at = 0.0
    for _ in range(rng.randint(1, 5)):
        model = rng.choice(models).name
        spread = rng.choice((0.0, 0.0, 0.3))
        for _ in range(rng.choice((1, 4, 12, 24))):
            prompt = rng.choice((5, 20, 60, 60, 180, 5000)) if rng.random() < 0.3 else rng.randint(5, 60)
            answer = rng.randint(1, 60)
            found.append(traced(len(found), at + rng.random() * spread, model, prompt, answer, answer + rng.randint(0, 20)))
        at += rng.choice((0.0, 0.05, 0.2, 0.5, 1.5, 3.0))
    return tuple(found)


# -- faults ---------------------------------------------------------------------------------------------------------------


def _faults(rng: Random, nodes: int) -> tuple[AnyFault, ...]:
    return tuple(_fault(rng, nodes) for _ in range(rng.randint(0, 7)))


def _cuts(rng: Random, nodes: int) -> tuple[Cut, ...]:
    """Cut connections, drawn by themselves: a seed's other faults do not depend on them."""
    count = rng.choice((0, 0, 1, 2)) if nodes > 1 else 0
    return tuple(
        Cut(
            when=_trigger(rng),
            pick=rng.randrange(nodes),
            near=rng.random() < 0.8,
            other=rng.randrange(nodes),
            mended_s=rng.choice((0.0, 0.005, 0.05, 0.3, 2.0)),
        )
        for _ in range(count)
    )


def _trigger(rng: Random, moments: Sequence[tuple[str, int]] = _MOMENTS) -> Trigger:
    what, most = rng.choice(moments)
    # Small numbers are more likely: most runs have few of a kind.
    nth = 1 + int(most * rng.random() ** 2)
    return Trigger(what, nth, rng.choice((0.0, 0.0, round(rng.random() * 0.3, 3))))


def _fault(rng: Random, nodes: int) -> AnyFault:
    kind = rng.choice(_KINDS)
    common: dict[str, Any] = {"when": _trigger(rng), "pick": rng.randrange(nodes), "near": rng.random() < 0.6}
    match kind:
        case "loss":
            return _loss(rng, common)
        case "slow":
            compute, nic = rng.choice(((1.0, 0.02), (1.0, 0.2), (8.0, 1.0), (50.0, 0.02)))
            return Slow(**common, compute=compute, nic=nic, lasts_s=rng.choice((0.05, 0.5, 2.0)), flaps=rng.choice((1, 1, 5)))
        case "late":
            return Late(**common, delay_s=rng.choice((0.001, 0.05, 0.5)), lasts_s=rng.choice((0.5, 3.0)))
        case "pause":
            return Pause(**common, lasts_s=rng.choice((0.05, 0.5, 5.0)))
        case "repeat":
            return Repeat(**common, count=rng.choice((1, 10)), after_s=rng.choice((0.0, 0.02, 0.3)))
        case "broken":
            return Broken(when=_trigger(rng, _BREAKABLE), damage=rng.random() < 0.7, times=rng.choice((1, 1, 2, 5)))
        case "poison":
            return Poison(**common)
        case "bad node":
            return BadNode(**common)
        case "clock":
            return ClockStep(**common, step_s=rng.choice((-2.0, -0.1, 0.1, 2.0, 30.0)))
    return Burst(when=Trigger("", 0), pick=rng.randrange(4), at_s=round(rng.random() * 5, 2), count=rng.choice((5, 20, 40)))


def _loss(rng: Random, common: dict[str, Any]) -> Loss:
    noticed = rng.choice((0.0, 0.0, 0.02, 0.3, 1.0))
    then = rng.choice(_ENDS)
    if rng.random() < 0.1:
        return Loss(**common, noticed_s=None, then="back", back_s=rng.choice((0.0, 0.1, 1.0)))
    return Loss(**common, noticed_s=noticed, then=then, back_s=rng.choice((0.0, 0.05, 0.5, 3.0)))
