"""Small runs, event by event: a change of behaviour shows up as a readable diff.

After an intended change: LAMBDASCALE_GOLDEN=write python -m pytest tests/golden, and read the diff.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lambdascale.control import SystemConfig, build_system, drive
from lambdascale.core import ClusterSpec, ModelSpec, TracedRequest, traced
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.metrics import Recorder, events_table
from lambdascale.sim import SimConfig
from lambdascale.testing.invariants import InvariantChecker
from lambdascale.testing.systems import burst, small_cluster, small_model

HERE = Path(__file__).parent


def log(
    system: SystemConfig,
    cluster: ClusterSpec,
    requests: Sequence[TracedRequest],
    models: Sequence[ModelSpec] = (),
    failures: Sequence[tuple[int, float]] = (),
) -> str:
    """One line per event and command of a run."""
    models = models or [small_model()]
    backend = SimConfig(node_failures=tuple(failures)).build(
        cluster=cluster, models=models, requests=requests, batching=system.batching, seed=0
    )
    recorder, checker = Recorder(), InvariantChecker(cluster, system.blocks)
    drive(build_system(system, cluster=cluster, models=models), backend, [recorder, checker])
    checker.finish()
    lines = []
    for row in events_table(recorder).to_pylist():
        shown = " ".join(
            f"{key}={value}" for key, value in row.items() if value is not None and key not in ("seq", "at_s", "kind")
        )
        lines.append(f"{row['at_s']:.6f} {row['kind']} {shown}".rstrip())
    return "\n".join(lines) + "\n"


def configured(*overrides: str) -> SystemConfig:
    return replace(build(compose(overrides)).system, blocks=4)


def lambdascale_burst() -> str:
    """λScale, four nodes, a burst of 16 from one replica: multicast, pipelines, mode switch, release."""
    return log(configured(), small_cluster(4), burst(16))


def kv_copy() -> str:
    """The same with two sources and long prompts, whose KV is copied at the mode switch over a slow network.

    Of so long prompts the pipeline brings none to a token, so it forms only because it always does.
    """
    system = configured(
        *("system.kv=copy", "system.autoscaler.min_replicas=2", "system.memory.initial_copies=0"),
        "+system.start.pipelines.form=always",
    )
    requests = [traced(i, 0.0, "small", 4000, 60 + 11 * (i % 4)) for i in range(24)]
    return log(system, replace(small_cluster(4), nic_bytes_per_s=1e9), requests)


def several_models() -> str:
    """Three models on two nodes: idle replicas make room, host copies are kept, used, expire and are evicted."""
    system = configured(
        *("system.autoscaler.min_replicas=0", "system.autoscaler.keep_alive_s=5", "system.memory.keep_alive_s=6"),
        *("system.memory.initial_copies=1", "system.memory.budget=2GB"),
    )
    models = [small_model(name) for name in "abc"]
    waves = [(0.0, "a"), (0.1, "b"), (3.0, "c"), (6.0, "a"), (9.0, "b"), (20.0, "c")]
    requests = [request for i, (at_s, model) in enumerate(waves) for request in burst(5, at_s, 5 * i, model)]
    return log(system, small_cluster(2), requests, models)


def death_in_a_multicast() -> str:
    """A destination, then the source die while blocks are under way: new plans from what the survivors hold."""
    return log(configured(), small_cluster(5), burst(20), failures=[(2, 0.22), (1, 0.4)])


@pytest.mark.parametrize("run", [lambdascale_burst, kv_copy, several_models, death_in_a_multicast], ids=lambda run: run.__name__)
def test_event_log(run: Callable[[], str]) -> None:
    golden = HERE / f"{run.__name__}.txt"
    if os.environ.get("LAMBDASCALE_GOLDEN") == "write":
        golden.write_text(run())
    assert run() == golden.read_text()
