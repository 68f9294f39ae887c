"""Instances whose stages move while requests run, on real processes: the same parts as in the simulator, the engine's tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lambdascale.checkpoints import PackedModel
from lambdascale.control import SystemConfig
from lambdascale.control.start import StartPolicy
from lambdascale.core import TracedRequest
from lambdascale.core.commands import KvPolicy, ReleaseNode, Repartition, Serve, SwitchMode
from lambdascale.core.events import RequestFinished
from lambdascale.testing.starts import CooperativeStart, SpreadStart
from tests.live.harness import Outcome, burst, expected, of, run, system_of

pytestmark = pytest.mark.live


def system(start: StartPolicy, kv: KvPolicy, *overrides: str) -> SystemConfig:
    base = system_of("lambdascale", "system.memory.initial_copies=0", *overrides)
    return replace(base, name="parts", start=start, kv=kv)


def check(outcome: Outcome, directory: Path, requests: list[TracedRequest]) -> None:
    assert outcome.answers == expected(PackedModel.open(directory, "tiny"), requests)
    assert (outcome.rows.status == "ok").all()
    assert (outcome.rows.restarts == 0).all()


def times(outcome: Outcome, kind: type[Any]) -> list[float]:
    return [at for at, entry in outcome.recorder.entries if isinstance(entry, kind)]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_cooperative_execution(tiny: Path, transport: str) -> None:
    """The boundary moves with each block that arrives, requests run across all moves, then both nodes serve alone."""
    requests = burst(24)
    outcome = run(tiny, requests, system=system(CooperativeStart(), "copy"), nodes=2, link="4MB/s", transport=transport)
    check(outcome, tiny, requests)
    moves = of(outcome, Repartition)
    assert [move.stages[0].last_block for move in moves] == list(range(7))
    assert all([stage.node for stage in move.stages] == [1, 0] for move in moves)
    assert len(of(outcome, SwitchMode)) == 1
    assert [len(serve.stages) for serve in of(outcome, Serve)] == [1, 1, 1]
    first, last = times(outcome, Repartition)[0], times(outcome, SwitchMode)[0]
    across = outcome.rows[(outcome.rows.first_token_s < first) & (outcome.rows.finished_s > last)]
    assert len(across), "some requests begin before the first move and end after the last"


@pytest.mark.parametrize("kv", ["copy", "recompute"])
def test_a_cold_start_over_four_nodes_is_consolidated(tiny: Path, kv: KvPolicy) -> None:
    """Each node loads a quarter; then the first loads the rest and takes all over while requests run, and three are released."""
    requests = burst(12)
    overrides = ("system.autoscaler.min_replicas=0", "system.autoscaler.target_per_replica=64")
    outcome = run(
        tiny,
        requests,
        system=system(SpreadStart(), kv, *overrides),
        cluster_changes={"ssd_bytes_per_s": "2MB/s"},
    )
    check(outcome, tiny, requests)
    (serve,), (move,) = of(outcome, Serve), of(outcome, Repartition)
    nodes = [stage.node for stage in serve.stages]
    assert sorted(nodes) == [0, 1, 2, 3]
    assert [stage.node for stage in move.stages] == nodes[:1]
    assert [command.node for command in of(outcome, ReleaseNode)][:3] == nodes[1:]
    (moved,) = times(outcome, Repartition)
    across = outcome.rows[(outcome.rows.first_token_s < moved) & (outcome.rows.finished_s > moved)]
    assert len(across), "requests run across the consolidation"
    assert max(times(outcome, RequestFinished)) > moved
