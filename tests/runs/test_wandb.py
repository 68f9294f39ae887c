"""Offline W&B runs, read back with wandb's own commands."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest

from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.experiments.finished import find_runs, finished_run, log_to_wandb
from lambdascale.experiments.runner import run
from lambdascale.live.config import LiveConfig
from lambdascale.metrics import over_time
from lambdascale.metrics.wandb_sink import WandbLogger, flat_summary, notes

SCRIPTS = conf_dir().parent / "scripts"
SMALL = ["workload.duration_s=60"]
ROWS = 10


def wandb(*arguments: str, cwd: Path) -> str:
    """Output of a wandb command."""
    command = [sys.executable, "-m", "wandb", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@dataclass
class Logged:
    """A W&B run as stored in its file."""

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def media(self, key: str) -> Path:
        """File of a logged table or image."""
        (path,) = (row[f"{key}.path"] for row in self.history if f"{key}.path" in row)
        return self.folder / "files" / str(path)


def read_back(folder: Path) -> Logged:
    """Read a W&B run with wandb's own reader of its logs."""
    logged = Logged(folder)
    for line in filter(None, wandb("leet", "inspect", "--json", str(folder.resolve()), cwd=folder).splitlines()):
        record = json.loads(line)
        content = record[record["type"]]
        match record["type"]:
            case "run":
                logged.run = content
                logged.config |= content["config"]["update"]
            case "summary":
                logged.summary |= content.get("update", {})
            case "history":
                logged.history.append(content["item"])
            case "artifact":
                logged.artifacts.append(content)
            case "exit":
                logged.exit_code = content.get("exit_code", 0)
    return logged


def read_all(results: Path) -> dict[str, Logged]:
    """All logged runs, by system."""
    every = [read_back(path) for path in sorted(results.glob("wandb/offline-run-*"))]
    return {logged.config["system"]["name"]: logged for logged in every}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    overrides = [*SMALL, "token_times=true", "logger=wandb", f"logger.request_rows={ROWS}", "logger.tags=[mine]", "tags=[theirs]"]
    command = [sys.executable, str(SCRIPTS / "run.py"), *overrides, "system=ideal,lambdascale", "-m"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def logged(sweep: Path) -> dict[str, Logged]:
    return read_all(sweep / "results")


@pytest.fixture(scope="module")
def one(logged: dict[str, Logged]) -> Logged:
    return logged["lambdascale"]


@pytest.fixture(scope="module")
def folder(sweep: Path, one: Logged) -> Path:
    """The run's own folder, found through its W&B run."""
    return sweep / one.config["run"]["folder"]


def test_a_sweep_is_one_group_of_finished_runs(logged: dict[str, Logged]) -> None:
    assert set(logged) == {"ideal", "lambdascale"}
    (group,) = {each.run["run_group"] for each in logged.values()}
    assert group.startswith("run-2")
    assert [each.exit_code for each in logged.values()] == [0, 0]
    assert {each.run["display_name"] for each in logged.values()} == {
        Path(each.config["run"]["folder"]).name for each in logged.values()
    }


def test_type_tags_and_notes(one: Logged) -> None:
    assert one.run["job_type"] == "simulated"
    assert one.run["tags"] == ["run", "simulated", "lambdascale", "llama2_13b", "testbed1", "theirs", "mine"]
    assert one.run["notes"].startswith("Simulated: ")


def test_configuration(one: Logged, folder: Path) -> None:
    assert one.config["model"]["name"] == "llama2_13b"
    assert one.config["system"]["blocks"] == 16
    manifest = json.loads((folder / "manifest.json").read_text())
    assert one.config["run"]["sha256"] == manifest["run_sha256"]
    assert one.config["run"]["git_sha"] == manifest["git"]["sha"]


def test_summary(one: Logged, folder: Path) -> None:
    ours = json.loads((folder / "summary.json").read_text())
    assert {name: one.summary[f"ttft_{name}_s"] for name in ours["ttft_s"]} == ours["ttft_s"]
    assert {name: one.summary[f"tpot_{name}_s"] for name in ours["tpot_s"]} == ours["tpot_s"]
    assert {name: one.summary[f"itl_{name}_s"] for name in ours["itl_s"]} == ours["itl_s"]
    assert {name: one.summary[f"requests_{name}"] for name in ours["requests"]} == ours["requests"]
    for name in ("gpu_seconds", "cost_usd", "scale_outs", "backend", "simulated_s"):
        assert one.summary[name] == ours[name]


def test_the_request_table_is_a_sample_and_says_so(one: Logged, folder: Path) -> None:
    ours = pd.read_parquet(folder / "requests.parquet")
    assert one.summary["requests_logged"] == ROWS < one.summary["requests_total"] == len(ours)
    assert f"{ROWS} of {len(ours)} rows" in one.run["notes"]
    document = json.loads(one.media("requests").read_text())
    table = pd.DataFrame(document["data"], columns=document["columns"])
    expected = ours.sample(ROWS, random_state=1).sort_index()
    assert table.request_id.tolist() == expected.request_id.tolist(), "the run's seed decides which"
    assert table.ttft_s.tolist() == expected.ttft_s.tolist()
    assert table.stall_s.tolist() == expected.stall_s.tolist()
    assert set(ours.columns) - set(table.columns) == {"itl_s"}, "a list is no cell"


def test_the_figure(one: Logged) -> None:
    assert one.media("run_overview").read_bytes().startswith(b"\x89PNG")


def test_curves_over_the_runs_own_time(one: Logged) -> None:
    rows = [row for row in one.history if "over_time/gpus" in row]
    assert len(rows) == 100
    assert rows[-1]["over_time/time_s"] == pytest.approx(one.summary["simulated_s"])
    assert rows[-1]["over_time/gpu_seconds"] == pytest.approx(one.summary["gpu_seconds"])
    assert rows[-1]["over_time/finished"] == one.summary["requests_completed"]


def test_the_artifact_is_the_folder(one: Logged, folder: Path) -> None:
    (artifact,) = (artifact for artifact in one.artifacts if artifact["type"] == "run-folder")
    stored = {entry["path"]: int(entry["size"]) for entry in artifact["manifest"]["contents"]}
    assert stored == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert json.loads(artifact["metadata"])["folder"] == one.config["run"]["folder"]


def test_everything_wandb_writes_is_in_its_folder(sweep: Path) -> None:
    assert [path.name for path in sweep.iterdir()] == ["results"]
    assert sorted(path.name for path in (sweep / "results").iterdir()) == ["raw", "wandb"]


def test_wandb_finds_the_runs_to_sync(sweep: Path, logged: dict[str, Logged]) -> None:
    listed = wandb("sync", "--dry-run", *(str(each.folder) for each in logged.values()), cwd=sweep / "results")
    for each in logged.values():
        assert each.run["run_id"] in listed


@pytest.mark.parametrize("executor", ["torch", "paced", "timed"])
def test_live_runs_say_what_is_real(executor: Literal["torch", "paced", "timed"], folder: Path) -> None:
    finished = finished_run(folder)
    live = replace(finished, summary={**finished.summary, "backend": LiveConfig(executor=executor).label})
    words = notes(live, 3, 7)
    assert words.startswith("Live")
    assert ("computation" in words) == (executor != "torch"), "computed here unless it says otherwise"
    assert "3 of 7 rows" in words


class TestOnce:
    def test_afterwards_and_not_twice(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = run(compose([*SMALL, f"results={tmp_path}"])).folder
        arguments = [str(tmp_path / "raw"), f"logger.directory={tmp_path}", "logger.group=mine"]
        log_to_wandb(arguments)
        log_to_wandb(arguments)
        assert capsys.readouterr().out.splitlines() == [f"logged {folder}", f"logged before {folder}"]
        (each,) = read_all(tmp_path).values()
        assert each.run["run_group"] == "mine"

    def test_a_reused_run_is_logged_if_it_was_not(self, tmp_path: Path) -> None:
        run(compose([*SMALL, f"results={tmp_path}"]))
        for _ in range(2):
            assert run(compose([*SMALL, f"results={tmp_path}", "logger=wandb", f"logger.directory={tmp_path}"])).reused
            assert len(read_all(tmp_path)) == len(list(tmp_path.glob("wandb/offline-run-*"))) == 1

    def test_a_report_cut_short_is_made_again(self, tmp_path: Path) -> None:
        finished = finished_run(run(compose([*SMALL, f"results={tmp_path}"])).folder)
        logger = WandbLogger(directory=str(tmp_path))
        assert logger.log_run(finished)
        (folder,) = tmp_path.glob("wandb/offline-run-*")
        (folder / "lambdascale-complete").unlink()
        assert logger.log_run(finished)
        assert not logger.log_run(finished)
        (each,) = read_all(tmp_path).values()
        assert each.exit_code == 0

    @pytest.mark.parametrize("arguments", [[], ["nowhere"], ["seed=3"], ["."], [".", "seed=3"]])
    def test_mistakes(self, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"usage|no finished run"):
            log_to_wandb(arguments)


def test_only_finished_runs_are_found(tmp_path: Path) -> None:
    for name, files in {
        "b": ["summary.json", "manifest.json"],
        "a": ["summary.json"],
        ".c.tmp": ["summary.json", "manifest.json"],
    }.items():
        (tmp_path / "x" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "x" / name / file).write_text("{}")
    assert find_runs([tmp_path, tmp_path / "x"]) == [tmp_path / "x" / "b"]


def test_names_of_numbers() -> None:
    summary = {
        "ttft_s": {"p90": 1.0},
        "requests": {"failed": 2},
        "cost_usd": 3.0,
        "per_model": {"m-00": {"ttft_s": {"p50": None}}},
    }
    assert flat_summary(summary) == {"ttft_p90_s": 1.0, "requests_failed": 2, "cost_usd": 3.0, "model/m-00/ttft_p50_s": None}


def test_over_time() -> None:
    gpus = pd.DataFrame({"at_s": [0.0, 1.0, 3.0], "delta": [1, 2, -1]})
    requests = pd.DataFrame({"arrival_s": [0.0, 0.5, 3.9], "ttft_s": [0.1, 0.3, np.nan], "finished_s": [1.5, 4.0, np.nan]})
    curves = over_time(requests, gpus, 4.0, windows=2)
    assert curves.time_s.tolist() == [2.0, 4.0]
    assert curves.gpus.tolist() == [2.0, 2.5], "1 for a second, then 3 for two, then 2"
    assert curves.gpu_seconds.tolist() == [4.0, 9.0]
    assert curves.finished.tolist() == [1, 2]
    assert curves.ttft_max_s.tolist()[0] == 0.3
    assert np.isnan(curves.ttft_max_s.tolist()[1])
