"""Every system of conf/system, and the switches of λScale, through the conformance suite."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from lambdascale.control import SystemConfig
from lambdascale.control.start import MulticastStart
from lambdascale.core.commands import Serve
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.pipelines import ComplementaryPipelines, NoPipelines
from lambdascale.testing.systems import SystemConformance, burst, small_cluster

SYSTEMS = sorted(path.stem for path in (conf_dir() / "system").glob("*.yaml"))


@cache
def configured(name: str, *overrides: str) -> SystemConfig:
    """The system of a name, composed once: its parts are frozen, and composing takes as long as a test's run."""
    return build(compose([f"system={name}", *overrides])).system


@pytest.fixture(params=SYSTEMS)
def system_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestConfiguredSystems(SystemConformance):
    @pytest.fixture(autouse=True)
    def _system(self, system_name: str) -> None:
        self.system = configured(system_name)

    def make_system(self) -> SystemConfig:
        return self.system


class TestPrototypeBatches(SystemConformance):
    def make_system(self) -> SystemConfig:
        return configured(
            "lambdascale", "batching@system.batching=prototype", "autoscaler@system.autoscaler=prototype", "system.blocks=7"
        )


class TestKvCopyWithOwnCopies(SystemConformance):
    def make_system(self) -> SystemConfig:
        return configured("lambdascale", "system.kv=copy", "system.memory.initial_copies=4")


class TestUnshiftedOneBlock(SystemConformance):
    def make_system(self) -> SystemConfig:
        return configured("lambdascale", "system.start.planner.order=none", "system.blocks=1")


def pipelined(**changes: object) -> SystemConfig:
    config = configured("lambdascale_tuned", "system.memory.initial_copies=3", "batching@system.batching=prototype")
    assert isinstance(config.start, MulticastStart)
    pipelines = changes.pop("pipelines", config.start.pipelines)
    return replace(config, start=replace(config.start, pipelines=pipelines), **changes)


class Suite(SystemConformance):
    def __init__(self, config: SystemConfig) -> None:
        self.config = config

    def make_system(self) -> SystemConfig:
        return self.config


@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_pipelines_serve_first_tokens_before_any_node_is_complete(kv: str) -> None:
    with_pipelines, recorder = Suite(pipelined(kv=kv)).run(burst(60), target_per_replica=1)
    entries = [(at, type(entry).__name__, entry) for at, entry in recorder.entries]
    formed = [at for at, kind, entry in entries if kind == "Serve" and entry.is_pipeline]
    replicas = [at for at, kind, entry in entries if kind == "Serve" and not entry.is_pipeline and at > 0]
    assert formed
    assert min(formed) < min(replicas)
    assert "pipeline" in with_pipelines.first_modes.values()
    assert sum(kind == "SwitchMode" for _, kind, _ in entries) == len(formed)
    without, _ = Suite(pipelined(kv=kv, pipelines=NoPipelines())).run(burst(60), target_per_replica=1)
    assert set(without.first_modes.values()) == {"local"}


def test_more_sources_make_pipelines_ready_earlier() -> None:
    first = []
    for copies in (1, 3):
        base = configured("lambdascale_tuned", f"system.memory.initial_copies={copies}")
        assert isinstance(base.start, MulticastStart)
        config = replace(base, start=replace(base.start, pipelines=ComplementaryPipelines()))
        _, recorder = Suite(config).run(burst(200), cluster=small_cluster(12), target_per_replica=1)
        ready = [at for at, entry in recorder.entries if isinstance(entry, Serve) and entry.is_pipeline]
        first.append(min(ready, default=float("inf")))
    assert first[1] < first[0]


def test_ideal_is_never_beaten_on_a_burst() -> None:
    means = {}
    for name in SYSTEMS:
        _, recorder = Suite(configured(name)).run(burst(60), target_per_replica=2)
        seen: dict[int, float] = {}
        for at, entry in recorder.entries:
            if type(entry).__name__ == "TokensProduced":
                seen.setdefault(entry.request_id, at)
        means[name] = sum(seen.values()) / len(seen)
    assert min(means, key=lambda name: means[name]) == "ideal"
