"""Parts of a TTFT: zero or more, and their sum, for every system and whatever goes wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.control import SystemConfig, build_system, drive
from lambdascale.core import traced
from lambdascale.core.commands import Serve, SwitchMode
from lambdascale.core.events import NodeLost, RequestPreempted
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.metrics import Recorder, requests_table
from lambdascale.metrics.ttft_parts import PARTS
from lambdascale.sim import SimConfig
from lambdascale.testing.systems import LIMIT, burst, small_cluster, small_model, with_kv_tokens

SYSTEMS = sorted(path.stem for path in (conf_dir() / "system").glob("*.yaml"))


@cache
def system_of(name: str, *overrides: str) -> SystemConfig:
    return replace(build(compose([f"system={name}", *overrides])).system, blocks=4)


def check(recorder: Recorder) -> list[dict[str, float]]:
    """Rows with a first token, once their parts are what they have to be."""
    rows = [row for row in requests_table(recorder, "s").to_pylist() if row["ttft_s"] is not None]
    for row in rows:
        parts = [row[f"{part}_s"] for part in PARTS]
        assert min(parts) >= 0.0, row
        assert sum(parts) == pytest.approx(row["ttft_s"], rel=1e-9, abs=1e-9), row
    return rows


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(SYSTEMS),
    waves=st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.1, 4.0, 30.0]), st.integers(1, 24)), min_size=1, max_size=3),
    models=st.integers(1, 3),
    failures=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([0.2, 0.45, 0.9, 1.6, 4.4])), max_size=2, unique_by=lambda f: f[0]
    ),
    copies=st.integers(0, 2),
    kv_tokens=st.sampled_from([None, 2 * LIMIT]),
)
def test_they_add_up(
    name: str,
    waves: list[tuple[float, int]],
    models: int,
    failures: list[tuple[int, float]],
    copies: int,
    kv_tokens: int | None,
) -> None:
    system = system_of(name, "system.autoscaler.min_replicas=0", f"system.memory.initial_copies={copies}")
    specs = [small_model(model) for model in "abc"[:models]]
    cluster = small_cluster(6) if kv_tokens is None else with_kv_tokens(small_cluster(6), kv_tokens)
    requests = sorted(
        (r for i, (at_s, count) in enumerate(waves) for r in burst(count, at_s, 100 * i, "abc"[i % models])),
        key=lambda r: (r.arrival_s, r.request_id),
    )
    backend = SimConfig(node_failures=tuple(failures)).build(
        cluster=cluster, models=specs, requests=requests, batching=system.batching, seed=0
    )
    recorder = Recorder()
    drive(build_system(system, cluster=cluster, models=specs), backend, [recorder])
    assert len(check(recorder)) + 6 * len(failures) * 24 >= len(requests)


def test_through_pipelines_mode_switches_preemption_and_a_lost_node() -> None:
    """One run with all of them, so that none is left out by what examples happen to be drawn."""
    system = system_of("lambdascale", "+system.start.pipelines.form=always", "system.memory.initial_copies=0")
    cluster = with_kv_tokens(small_cluster(5), 3 * LIMIT)
    requests = [traced(i, 0.0, "small", 60 + 7 * (i % 5), 80, LIMIT) for i in range(40)]
    backend = SimConfig(node_failures=((1, 0.9),)).build(
        cluster=cluster, models=[small_model()], requests=requests, batching=system.batching, seed=0
    )
    recorder = Recorder()
    drive(build_system(system, cluster=cluster, models=[small_model()]), backend, [recorder])
    kinds = {type(entry) for _, entry in recorder.entries}
    assert {SwitchMode, NodeLost, RequestPreempted} <= kinds
    assert any(isinstance(entry, Serve) and entry.is_pipeline for _, entry in recorder.entries)
    rows = check(recorder)
    assert len(rows) == len(requests)
    assert {row["first_token_mode"] for row in rows} == {"local", "pipeline"}
    assert any(row["restarts"] for row in rows)
    assert any(row["transfer_s"] for row in rows)
