"""Bursts on GPUs: several in one run, those that count, pairs, and their ratios."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from lambdascale.core import UserError
from lambdascale.experiments.gpu_bursts import SETTING, BurstRun, BurstTimes, measure, paired, period_s, ratio
from lambdascale.experiments.gpu_runs import DisturbedRunError

RUN = BurstRun(
    **{"model": "7B", "system": "lambdascale", "pipelines": True, "nodes": 4, "cluster": "measured/h200"},
    **{"link": "25Gb/s", "sources": 2, "count": 60, "prompt_tokens": 512, "output_tokens": 16, "kv": "recompute"},
)


def bursts(run: BurstRun, number: int, period: float) -> list[dict[str, Any]]:
    return measure(run, run.simulated(16, bursts=number, period_s=period))


def test_every_burst_of_a_run_is_like_a_run_of_its_own() -> None:
    run = replace(RUN, count=120, output_tokens=64)
    (alone,) = bursts(run, 1, 1.0)
    together = bursts(run, 3, period_s(run, 16))
    assert [row["burst"] for row in together] == [1, 2, 3]
    for row in together:
        assert row["requests"] == row["finished"] == 120
        assert row["first_tokens_of_pipelines"] == alone["first_tokens_of_pipelines"] > 0
        assert row["ttft_p90_s"] == pytest.approx(alone["ttft_p90_s"], abs=0.01)  # waits for the autoscaler are alike
        assert row["last_block_s"] == pytest.approx(alone["last_block_s"], abs=0.01)


def test_bursts_that_meet_do_not_count() -> None:
    short = bursts(RUN, 1, 1.0)[0]["all_finished_s"] / 2
    with pytest.raises(DisturbedRunError, match="too short"):
        bursts(RUN, 2, short)


def test_a_burst_that_begins_with_other_replicas_does_not_count() -> None:
    first = bursts(RUN, 2, 100.0)[0]
    assert first["all_finished_s"] < first["released_s"] - 0.1
    assert 2 not in [row["burst"] for row in bursts(RUN, 3, first["released_s"] - 0.05)]


def test_the_period_is_long_enough_for_both_sides() -> None:
    slow = bursts(replace(RUN, pipelines=False), 1, 1.0)[0]["all_finished_s"]
    assert period_s(RUN, 16) == period_s(replace(RUN, pipelines=False), 16) > slow
    assert period_s(RUN, 16, sharing=2) > 2 * slow


def test_models_of_unknown_size_cannot_be_simulated() -> None:
    with pytest.raises(UserError, match="mine cannot be simulated"):
        period_s(replace(RUN, model="mine"), 16)


def test_without_pipelines_only_nodes_differ_from_the_other_side() -> None:
    on, off = RUN.simulated(16), replace(RUN, pipelines=False).simulated(16)
    assert on.cluster == off.cluster
    assert on.system != off.system


def test_other_systems_have_no_mode_switches() -> None:
    run = replace(RUN, system="serverlessllm", kv="copy")
    assert bursts(run, 1, 1.0)[0]["first_tokens_of_pipelines"] == 0


def row(**values: Any) -> dict[str, Any]:
    columns = {**RUN.row(), "seed": 1, "burst": 1, "measured_on": "a card", **values}
    return columns | {name: columns.get("s", 1.0) for name in ("ttft_p50_s", "ttft_p90_s", "ttft_max_s", "all_finished_s")}


def test_pairs_share_machine_seed_and_burst() -> None:
    rows = [
        row(burst=1, s=1.0),
        row(burst=1, s=2.0, pipelines=False),
        row(burst=2, s=3.0),  # its partner was disturbed
        row(burst=3, s=9.0, pipelines=False, measured_on="another card"),
        row(burst=1, s=4.0, kv="copy"),
    ]
    found = {setting["kv"]: pairs for setting, pairs in paired(pd.DataFrame(rows))}
    assert {kv: len(pairs) for kv, pairs in found.items()} == {"recompute": 1, "copy": 1}
    assert ratio(found["recompute"]).value == 0.5
    assert ratio(found["copy"]).value == 2.0


def test_five_pairs_have_an_interval() -> None:
    rows = [row(burst=n, s=1 + n / 100 if on else 2.0, pipelines=on) for n in range(5) for on in (True, False)]
    ((_, pairs),) = paired(pd.DataFrame(rows))
    assert ratio(pairs).known
    assert not ratio(pairs.iloc[:4]).known


def test_rows_name_their_run() -> None:
    assert (
        BurstRun.of_row({name: str(value) for name, value in RUN.row().items() if name != "pipelines"} | {"pipelines": True})
        == RUN
    )
    assert set(SETTING) - {"measured_on"} <= set(RUN.row())


def test_before_the_first_request_nothing_counts() -> None:
    assert BurstTimes(1).rows() == []


HOST = replace(RUN, tier="host", nodes=2, sources=0, link="3GB/s", count=40)


def test_from_host_memory_every_burst_begins_with_copies_and_no_replica() -> None:
    """Each node loads a half first, so that a pipeline forms after half of 7B at 3 GB/s, 2.25 s."""
    rows = bursts(HOST, 2, period_s(HOST, 16))
    assert [row["burst"] for row in rows] == [1, 2]
    for row in rows:
        assert row["pipeline_formed_s"] == pytest.approx(13.48 / 3 / 2, rel=0.02)
        assert row["last_block_s"] == pytest.approx(13.48 / 3, rel=0.02)
    (without,) = bursts(replace(HOST, pipelines=False), 1, 1.0)
    assert without["last_block_s"] == pytest.approx(rows[0]["last_block_s"], rel=0.01)
    assert without["ttft_p50_s"] > rows[0]["ttft_p50_s"] + 1.0


@pytest.mark.parametrize(("wrong", "message"), [({"tier": "disk"}, "gpu or host"), ({"tier": "host"}, "sources must be 0")])
def test_where_copies_lie_is_checked(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(RUN, **wrong)  # type: ignore[arg-type]  # texts
