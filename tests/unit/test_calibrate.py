"""Calibration: a «live» run that is a simulation of a slower cluster, whose constants are to be found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf

from lambdascale.cli.main import main
from lambdascale.core import UserError
from lambdascale.experiments.calibration import Calibration, calibrate, recorded
from lambdascale.experiments.compose import compose
from lambdascale.experiments.folder import fingerprints
from lambdascale.experiments.runner import run
from lambdascale.metrics.fidelity import errors, startup_s

COMMON = ["model=llama2_7b", "cluster.nodes=6", "workload=burst", "workload.count=120", "workload.spread_s=40"]
# What the configuration says, and what the machine really does.
SLOWER = ["cluster.nic_bytes_per_s=25GB/s", "cluster.gpu.hbm_bytes_per_s=1.675e12", "cluster.gpu.peak_flops=494.5e12"]


def pretend(folder: Path, said: list[str]) -> Path:
    """Relabel a simulated run as live, of a configuration with the values that were ``said``."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(compose([*COMMON, *said]), resolve=True))
    change(folder, "summary.json", backend="live")
    change(folder, "manifest.json", files=fingerprints(folder))
    return folder


def change(folder: Path, name: str, **values: Any) -> None:
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(document | values))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run(compose([*COMMON, *SLOWER, f"out={tmp_path_factory.mktemp('runs') / 'live'}"])).folder
    return pretend(folder, [])


@pytest.fixture(scope="module")
def found(live: Path) -> Calibration:
    return calibrate(live)


def test_the_constants_are_found(found: Calibration) -> None:
    factors = {constant.key: constant.factor for constant in found.constants}
    assert factors["cluster.gpu.hbm_bytes_per_s"] == pytest.approx(0.5, rel=0.1)
    assert factors["cluster.gpu.peak_flops"] == pytest.approx(0.5, rel=0.1)
    assert factors["cluster.nic_bytes_per_s"] == pytest.approx(0.5, rel=0.1)


def test_with_them_the_errors_are_small(found: Calibration) -> None:
    table = found.errors.set_index(["metric", "statistic"])
    assert abs(table.error_percent["TPOT", "P50"]) > 30
    assert abs(table.error_after_percent["TPOT", "P50"]) < 10
    assert table.error_after_percent["TTFT", "MAPE"] < table.error_percent["TTFT", "MAPE"] / 2
    assert abs(table.error_after_percent["GPU-seconds", "total"]) < 10


def test_an_overhead_of_iterations_is_told_from_slow_ones(tmp_path: Path) -> None:
    overhead = "cluster.compute.iteration_overhead_s"
    folder = run(compose([*COMMON, f"{overhead}=0.03", f"out={tmp_path / 'live'}"])).folder
    found = calibrate(pretend(folder, [f"{overhead}=0.0"]))
    suggested = {constant.key: constant.suggested for constant in found.constants}
    assert suggested[overhead] == pytest.approx(0.03, rel=0.1)
    assert "cluster.gpu.hbm_bytes_per_s" not in suggested


def test_a_run_that_agrees_has_no_error(tmp_path: Path) -> None:
    """Same constants, same requests: the simulation is the run, whatever the workload was."""
    folder = run(compose([*COMMON, f"out={tmp_path / 'live'}"])).folder
    same = calibrate(pretend(folder, []))
    assert (same.errors.error_percent.dropna() == 0).all()
    assert all(constant.suggested == pytest.approx(constant.value) for constant in same.constants)
    assert same.startup_s == 0
    assert same.left_out == 0


def test_failed_requests_are_served_again_under_their_ids(tmp_path: Path) -> None:
    """Requests without a known answer (5 and 6) are left out: they failed in the run's own trace, or while being served."""
    rows = pd.DataFrame(
        {
            "request_id": [4, 2, 3, 5, 6],
            "arrival_s": [2.0, 1.0, 1.5, 1.1, 1.2],
            "model": "m",
            "prompt_tokens": 10,
            "max_tokens": 20,
            "output_tokens": [5, 6, None, None, None],
            "answer_tokens": [5, 6, 7, None, None],
            "status": ["ok", "ok", "failed", "failed", "failed"],
        }
    )
    rows.to_parquet(tmp_path / "requests.parquet")
    requests = recorded(tmp_path, ["m"], 10)
    assert [(each.request_id, each.arrival_s, each.output_tokens) for each in requests] == [(2, 1.0, 6), (3, 1.5, 7), (4, 2.0, 5)]
    with pytest.raises(UserError, match="the run served 'm', this one has n"):
        recorded(tmp_path, ["n"], 10)


def test_a_run_with_failures_is_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A request that failed live loaded the cluster too: it is simulated, and is in none of the errors."""
    folder = pretend(run(compose([*COMMON, f"out={tmp_path / 'live'}"])).folder, [])
    rows = pd.read_parquet(folder / "requests.parquet")
    rows.loc[3, ["status", "failure", "ttft_s", "finished_s", "output_tokens"]] = ["failed", "node 1 is lost", None, None, None]
    rows.to_parquet(folder / "requests.parquet")
    change(folder, "manifest.json", files=fingerprints(folder))
    assert main(["calibrate", str(folder)]) == 0
    found = calibrate(folder)
    assert (found.left_out, found.failed) == (0, 1)
    assert (found.errors.error_percent.dropna() == 0).all()
    assert "1 requests that the live run failed are served" in capsys.readouterr().out


def test_errors_are_of_requests_that_both_answered() -> None:
    live = pd.DataFrame({"request_id": [0, 1, 2], "status": "ok", "ttft_s": [1.0, 2.0, 4.0], "tpot_s": 0.1, "e2e_s": 5.0})
    simulated = live.assign(ttft_s=[1.1, 1.0, 9.0], status=["ok", "ok", "failed"])
    totals = {"scale_outs": 0, "gpu_seconds": 50.0}, {"scale_outs": 3, "gpu_seconds": 60.0}
    table = errors(live, simulated, *totals).set_index(["metric", "statistic"])
    assert table.error_percent["TTFT", "MAPE"] == pytest.approx((10 + 50) / 2)
    assert table.live["TTFT", "P50"] == pytest.approx(1.5)
    assert table.simulated["TTFT", "P50"] == pytest.approx(1.05)
    assert table.error_percent["TPOT", "P99"] == pytest.approx(0)
    assert table.error_percent["GPU-seconds", "total"] == pytest.approx(20)
    assert pd.isna(table.error_percent["scale-outs", "total"])


def test_startup_counts_from_the_later_of_nodes_and_request() -> None:
    rows = [
        ("Serve", 1, None, 0.0),
        ("Dispatch", 1, 7, 2.0),
        ("TokensProduced", 1, 7, 2.5),
        ("TokensProduced", 1, 8, 9.0),
        ("Dispatch", 2, 9, 3.0),
        ("Serve", 2, None, 4.0),
        ("TokensProduced", 2, 9, 5.5),
        ("Serve", 3, None, 4.0),
    ]
    events = pd.DataFrame(rows, columns=["kind", "instance", "request_id", "at_s"])
    assert startup_s(events) == pytest.approx((0.5 + 1.5) / 2)
    assert startup_s(events[:1]) is None


class TestCommand:
    """The command as a user runs it."""

    def test_prints_and_writes(self, live: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["calibrate", str(live), "--out", str(tmp_path / "errors.csv")]) == 0
        shown = capsys.readouterr().out
        assert "cluster.nic_bytes_per_s: 5e+10 -> 2.5" in shown
        assert "GPU-seconds" in shown
        assert list(pd.read_csv(tmp_path / "errors.csv").columns)[-2:] == ["error_percent", "error_after_percent"]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [(["nowhere"], "not the folder of a finished run"), (["nowhere", "--out", "x.txt"], "must name a .csv file")],
    )
    def test_mistakes(self, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["calibrate", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1

    def test_of_a_simulated_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = run(compose([*COMMON, "workload.count=2", f"out={tmp_path / 'run'}"])).folder
        assert main(["calibrate", str(folder)]) == 2
        assert "is simulated: calibrate takes a live one" in capsys.readouterr().err
