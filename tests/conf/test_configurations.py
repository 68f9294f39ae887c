"""Every file in conf/ composes into objects, and every experiment runs at a debug scale."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig

from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.experiments.runner import run

GROUPS = {
    "system": "system",
    "model": "model",
    "cluster": "cluster",
    "backend": "backend",
    "logger": "logger",
    "autoscaler": "autoscaler@system.autoscaler",
    "batching": "batching@system.batching",
    "memory": "memory@system.memory",
}
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def test_no_group_is_forgotten() -> None:
    tested_elsewhere = {"workload", "experiment", "hydra"}
    assert {path.name for path in conf_dir().iterdir() if path.is_dir()} == set(GROUPS) | tested_elsewhere


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_builds(group: str, choice: str) -> None:
    build(compose([f"{GROUPS[group]}={choice}"]))


CONSTANTS = [path for group in ("cluster", "model") for path in sorted((conf_dir() / group).glob("*.yaml"))]


@pytest.mark.parametrize("path", CONSTANTS, ids=lambda path: path.stem)
def test_constants_name_their_source(path: Path) -> None:
    assert "#" in path.read_text()


def debug_scale(experiment: str, tmp_path: Path, *overrides: str) -> DictConfig:
    arrivals = tmp_path / "arrivals.txt"
    arrivals.write_text("0\n0.5\n0.5\n2\n")
    smaller = {
        "paper_trace": [f"workload.path={arrivals}"],
        "live_burst": ["workload.count=8"],
        "tune_blocks": ["workload.count=20"],
    }
    small = smaller.get(experiment, ["workload.duration_s=60"])
    return compose([f"experiment={experiment}", f"results={tmp_path}", *small, *overrides])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(experiment: str, tmp_path: Path) -> None:
    result = run(debug_scale(experiment, tmp_path))
    assert result.folder.parent == tmp_path / "raw" / experiment
    assert result.summary["requests"]["completed"] == result.summary["requests"]["submitted"] > 0


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_says_how_to_run_it(experiment: str) -> None:
    head = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text().split("defaults:")[0]
    assert "scripts/" in head, "the command"
    assert "imulated" in head, "what is simulated, and how long it takes"
