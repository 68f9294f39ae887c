"""Sweeps in other processes: every Hydra launcher we offer, resumed sweeps, one exit status, searches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lambdascale.core import UserError
from lambdascale.experiments.compose import conf_dir
from lambdascale.experiments.search import objective_value
from tests.ray_turn import ray_turn

RUN = conf_dir().parent / "scripts" / "run.py"
SMALL = ["workload.duration_s=20"]

# A fake Slurm of one machine: it runs the tasks of an array in sequence, with scripts and results on disk as the real one.
SBATCH = """#!/bin/bash
script=$(mktemp) && cp "${@: -1}" "$script"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$script")
for task in $(seq 0 "$last"); do
  SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 \\
    SLURM_NODEID=0 SLURM_LOCALID=0 SLURM_PROCID=0 SLURM_TASKS_PER_NODE=1 bash "$script"
done >/dev/null 2>&1 &
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
exec "$@"
"""
SACCT = """#!/bin/bash
printf 'JobID|State|NodeList\\n7_[0-9]|RUNNING|here\\n'
"""


def script(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), *overrides]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False, env=environment)


def runs_of(folder: Path, experiment: str = "run") -> set[str]:
    return {path.name for path in (folder / "results" / "raw" / experiment).iterdir() if path.is_dir()}


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment whose path starts with fake Slurm commands."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


class TestSubmitit:
    @pytest.mark.slow
    def test_a_sweep_is_resumed_and_a_failed_job_shows_in_the_status(self, tmp_path: Path) -> None:
        first = script(tmp_path, *SMALL, "seed=1", "hydra/launcher=submitit_local", "-m")
        assert first.returncode == 0, first.stderr
        done = script(tmp_path, *SMALL, "system.blocks=16,4096", "hydra/launcher=submitit_local", "-m")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1, "one line for the one job that failed"
        assert "4096" in done.stderr
        assert len(runs_of(tmp_path)) == 1
        assert "reused" in done.stdout, "the first command's run"
        assert [path.name for path in tmp_path.iterdir()] == ["results"]

    @pytest.mark.slow
    def test_slurm(self, tmp_path: Path, slurm: dict[str, str]) -> None:
        done = script(tmp_path, *SMALL, "seed=1,2", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "-m", env=slurm)
        assert done.returncode == 0, done.stderr
        assert len(runs_of(tmp_path)) == 2
        (batch,) = (tmp_path / "results" / ".submitit").rglob("7_submission.sh")
        assert {"#SBATCH --partition=gpu", "#SBATCH --array=0-1%2", "#SBATCH --mem=4GB"} <= set(batch.read_text().splitlines())

    def test_without_slurm(self, tmp_path: Path) -> None:
        done = script(tmp_path, *SMALL, "hydra/launcher=slurm", "-m", env={"PATH": "/usr/bin:/bin"})
        assert done.returncode == 1
        assert "srun" in done.stderr


@pytest.mark.slow
def test_ray(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs the extra ray")
    options = ["system.blocks=16,4096", "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2", "-m"]
    with ray_turn():
        done = script(tmp_path, *SMALL, *options)
    assert done.returncode == 2
    assert "4096" in done.stderr
    assert len(runs_of(tmp_path)) == 1


def test_a_launcher_that_is_not_there(tmp_path: Path) -> None:
    done = script(tmp_path, *SMALL, "hydra/launcher=kubernetes", "-m")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "kubernetes" in done.stderr
    assert "pip install" in done.stderr


class TestSearch:
    SMALL = ("experiment=tune_blocks", "hydra.sweeper.n_trials=4", "workload.count=40")

    def test_the_best_of_all_trials_is_kept_and_found_again(self, tmp_path: Path) -> None:
        first, second = (script(tmp_path, *self.SMALL) for _ in range(2))
        assert (first.returncode, first.stderr) == (0, "")
        documents = [
            json.loads(p.read_text()) for p in sorted((tmp_path / "results/raw/tune_blocks").glob("optimization-*.json"))
        ]
        assert len(documents) == 2
        assert documents[0] == documents[1], "seeded"
        assert "wrote results/raw/tune_blocks/lambda" not in second.stdout, "every run of the second search is reused"
        trials = documents[0]["trials"]
        best = min(trials, key=lambda trial: trial["value"])
        assert documents[0]["best"]["value"] == best["value"]
        assert documents[0]["backend"] == "sim"
        settings = " ".join(f"{name}={value}" for name, value in documents[0]["best"]["settings"].items())
        assert f"best ttft_s.p90 (simulated): {best['value']:.6g} with {settings}, of 4 trials" in first.stdout
        folder = tmp_path / "results" / "raw" / "tune_blocks" / best["folder"]
        assert json.loads((folder / "summary.json").read_text())["ttft_s"]["p90"] == best["value"]
        system = yaml.safe_load((folder / "config.yaml").read_text())["system"]
        assert {"system.blocks": system["blocks"], "system.start.sources": system["start"]["sources"]} == documents[0]["best"][
            "settings"
        ]

    def test_a_mistake_ends_it_at_once(self, tmp_path: Path) -> None:
        done = script(tmp_path, *self.SMALL, "workload=azure", "~workload.count")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1

    def test_an_objective_that_is_none(self) -> None:
        assert objective_value("ttft_s.p90", {"ttft_s": {"p90": 2}}) == 2.0
        for name in ("ttft_s", "ttft_s.p95", "nothing", "p90.ttft_s"):
            with pytest.raises(UserError, match="objective="):
                objective_value(name, {"ttft_s": {"p90": 2}})
