"""The metrics of a run in every place that shows them: summary.json, tables of studies, W&B, and on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lambdascale.experiments.collect import ROWS
from lambdascale.experiments.compose import compose
from lambdascale.experiments.runner import RunResult, run
from lambdascale.metrics.wandb_sink import flat_summary

LEVELS = ("mean", "p50", "p90", "p95", "p99", "p999")


def requests(folder: Path, failing: int) -> Path:
    """Requests of a run to replay: 200, of which ``failing`` have prompts that no node can hold."""
    prompts = [10**8] * failing + [64] * (200 - failing)
    rows = {
        "arrival_s": [0.1 * index for index in range(200)],
        "model": "llama2_7b",
        "prompt_tokens": prompts,
        "output_tokens": 8,
        "max_tokens": 8,
        "status": "ok",
    }
    path = folder / "requests.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def result(folder: Path, failing: int) -> RunResult:
    overrides = ["model=llama2_7b", "token_times=true", "workload=run", f"workload.path={requests(folder, failing)}"]
    return run(compose([*overrides, f"out={folder / 'run'}"]))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return result(tmp_path_factory.mktemp("metrics"), 3)


def test_summary(ended: RunResult) -> None:
    summary = ended.summary
    for name in ("ttft_s", "tpot_s", "e2e_s", "ntpot_s", "queue_s"):
        assert set(summary[name]) == set(LEVELS)
        assert summary[name]["p50"] <= summary[name]["p95"] <= summary[name]["p99"] <= summary[name]["p999"]
    assert set(summary["itl_s"]) == {*LEVELS, "max"}
    assert summary["itl_s"]["max"] >= summary["itl_s"]["p999"] > 0
    assert set(summary["rates"]) == {"requested_per_s", "achieved_per_s", "drift_s"}
    assert list(summary["failures"].values()) == [3]
    assert summary["total_cost_usd"] == pytest.approx(summary["cost_usd"] + summary["host_cost_usd"])


def test_table(ended: RunResult) -> None:
    (row,) = ROWS["summary"](ended.folder).to_dict("records")
    shown = {f"{stem}_{level}_s" for stem in ("ttft", "e2e", "itl") for level in LEVELS} | {"itl_max_s", "ntpot_mean_s"}
    shown |= {"requested_per_s", "achieved_per_s", "drift_s", "requests_failed", "failures", "host_cost_usd", "total_cost_usd"}
    assert shown <= set(row)
    assert str(row["failures"]).endswith(": 3")


def test_wandb(ended: RunResult) -> None:
    """The summary in W&B is flat, with the names that tables have."""
    flat = flat_summary(ended.summary)
    shown = {f"{stem}_{level}_s" for stem in ("ttft", "tpot", "e2e", "ntpot", "itl") for level in LEVELS} | {"itl_max_s"}
    assert shown | {"rates_requested_per_s", "rates_drift_s", "host_cost_usd", "requests_failed"} <= set(flat)
    assert [value for name, value in flat.items() if name.startswith("failures_")] == [3]


@pytest.mark.parametrize(("failing", "says"), [(2, ""), (3, "3 of 200 requests failed; times are those of the others\n")])
def test_a_warning_above_one_per_cent(failing: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(tmp_path, failing)
    assert capsys.readouterr().err.partition("beside the prompt\n")[2] == says


HOUR = ["system=serverlessllm", "workload=burst", "workload.count=8", "cluster.nodes=4", "model=llama2_7b"]


@pytest.mark.parametrize("keep_alive_s", ["0", "null"])
def test_host_memory_that_copies_take(keep_alive_s: str, tmp_path: Path) -> None:
    """One copy from the start: of no duration, or of the whole run, and those of replicas that were released."""
    more = [f"system.memory.keep_alive_s={keep_alive_s}", "cluster.usd_per_host_gb_hour=3.6", f"out={tmp_path / 'run'}"]
    found: dict[str, Any] = run(compose([*HOUR, *more])).summary
    size_gb = 13.48
    least = size_gb * found["simulated_s"] if keep_alive_s == "null" else 0
    assert least * 0.98 <= found["host_gb_seconds"] <= 4 * size_gb * found["simulated_s"]
    assert (found["host_gb_seconds"] > 0) == (keep_alive_s == "null")
    assert found["host_cost_usd"] == pytest.approx(found["host_gb_seconds"] / 1000)
    assert found["total_cost_usd"] == pytest.approx(found["cost_usd"] + found["host_cost_usd"])
