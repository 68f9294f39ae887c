"""Instances whose stages move while requests run, on real processes: the tokens are the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lambdascale.checkpoints import PackedModel
from lambdascale.core.commands import KvPolicy, ReleaseNode, Repartition, Serve
from lambdascale.core.events import RequestFinished
from lambdascale.testing.scripted import CooperativeExecution, SpreadColdStart
from tests.live.harness import Outcome, burst, expected, of, run, system_of

pytestmark = pytest.mark.live
REQUESTS = [*burst(12), *(type(r)(r.request_id + 100, r.arrival_s, r.model, r.prompt_tokens, 20) for r in burst(6, at_s=1.0))]


def check(outcome: Outcome, directory: Path) -> None:
    assert outcome.answers == expected(PackedModel.open(directory, "tiny"), REQUESTS)
    assert (outcome.rows.status == "ok").all()


def times(outcome: Outcome, kind: type[Any]) -> list[float]:
    return [at for at, entry in outcome.recorder.entries if isinstance(entry, kind)]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_cooperative_execution(tiny: Path, transport: str) -> None:
    """The boundary moves with each of the eight blocks that arrives; requests run before, across all moves and after them."""
    outcome = run(
        tiny,
        REQUESTS,
        system=system_of("lambdascale"),
        nodes=2,
        scripted=lambda model: CooperativeExecution(model, 8, 2),
        transport=transport,
    )
    check(outcome, tiny)
    moves = of(outcome, Repartition)
    assert [len(move.stages) for move in moves] == [2] * 7 + [1]
    assert [move.stages[0].last_block for move in moves[:7]] == list(range(7))
    assert [move.stages[0].node for move in moves] == [1] * 7 + [0]
    assert [serve.stages[0].node for serve in of(outcome, Serve)] == [0, 1]
    finished = times(outcome, RequestFinished)
    first, last = times(outcome, Repartition)[0], times(outcome, Repartition)[-1]
    assert outcome.rows.first_token_s.min() < first
    assert max(finished) > last
    across = outcome.rows[(outcome.rows.first_token_s < first) & (outcome.rows.finished_s > last)]
    assert len(across), "some requests run on all nine partitions"


@pytest.mark.parametrize(("onto", "kv"), [(0, "copy"), (2, "copy"), (2, "recompute")])
def test_a_cold_start_over_four_nodes_is_consolidated(tiny: Path, onto: int, kv: KvPolicy) -> None:
    """Each node loads a quarter; then one (the head, or another) takes all over while requests run, and three are released."""
    outcome = run(
        tiny,
        REQUESTS,
        system=system_of("lambdascale", "system.memory.initial_copies=0"),
        scripted=lambda model: SpreadColdStart(model, 8, 4, onto, kv),
        cluster_changes={"ssd_bytes_per_s": "2MB/s"},
    )
    check(outcome, tiny)
    (serve,), (move,) = of(outcome, Serve), of(outcome, Repartition)
    assert [stage.node for stage in serve.stages] == [0, 1, 2, 3]
    assert [stage.node for stage in move.stages] == [onto]
    assert sorted(command.node for command in of(outcome, ReleaseNode)) == sorted({0, 1, 2, 3} - {onto})
    (moved,) = times(outcome, Repartition)
    across = outcome.rows[(outcome.rows.first_token_s < moved) & (outcome.rows.finished_s > moved)]
    assert len(across), "requests run across the consolidation"
    assert (outcome.rows.first_token_mode == "pipeline").any()
