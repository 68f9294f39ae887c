"""The studies of live runs, at a small scale."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from lambdascale.checkpoints.synthetic import smollm2_file
from lambdascale.core import UserError
from lambdascale.experiments.collect import study_table
from lambdascale.experiments.compose import compose
from lambdascale.experiments.live_tables import execute_while_load, sim_vs_live
from lambdascale.experiments.runner import run
from lambdascale.experiments.study import load_study
from tests.conf.points import points

ROOT = Path(__file__).resolve().parents[2]


def folders(experiment: str, results: Path, keep: Sequence[str], *overrides: str) -> list[Path]:
    """Run the points of a study that have all of ``keep`` among their overrides."""
    study = load_study([f"experiment={experiment}"])
    assert study is not None
    chosen = [point for point in points(study, experiment) if set(keep) <= set(point)]
    return [run(compose([f"experiment={experiment}", *point, *overrides, f"results={results}"])).folder for point in chosen]


def test_execute_while_load_of_the_simulator(tmp_path: Path) -> None:
    """Pipelines serve earlier wherever one is formed; without them, none serves."""
    study = load_study(["experiment=live_while_load"])
    assert study is not None
    rows = study_table(study, folders("live_while_load", tmp_path, ["backend=sim", "seed=1"]))
    table = execute_while_load(rows).set_index(["sources", "executes"])
    assert list(table.index.get_level_values("sources").unique()) == [1, 2, 4]
    assert (table.first_tokens_of_pipelines.xs("after loading", level="executes") == 0).all()
    early, late = (table.all_served_s.xs(kind, level="executes") for kind in ("while loading", "after loading"))
    served = table.first_tokens_of_pipelines.xs("while loading", level="executes") > 0
    # From one source the first node is complete in the round in which a pipeline could be ready.
    assert served.to_dict() == {1: False, 2: True, 4: True}
    assert (early[served] < late[served]).all()
    assert early[1] == late[1]
    # Complete nodes of a burst from four sources do not wait for the others.
    assert early[4] < 0.5 * table.all_served_s[4, "while loading, nodes leave together"]


def test_a_table_of_changed_runs_replaces_no_published_one(tmp_path: Path) -> None:
    changes = ["backend=sim", "seed=1", "system.start.sources=2", "workload.count=5"]
    command = [sys.executable, "scripts/live_tables.py", "--only", "execute_while_load", "--results", str(tmp_path), *changes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "raw" / "live_while_load" / "execute_while_load.csv"
    assert done.stdout.splitlines()[-1] == f"{made} (sim)"
    assert list(pd.read_csv(made).executes) == ["while loading", "while loading, nodes leave together", "after loading"]
    assert not (tmp_path / "tables").exists()


@pytest.mark.live
def test_a_simulation_beside_its_live_run(tmp_path: Path) -> None:
    try:
        smollm2_file()
    except UserError as error:
        pytest.skip(str(error))
    study = load_study(["experiment=live_fidelity"])
    assert study is not None
    keep = ["cluster.nodes=12", "system=lambdascale", "seed=1"]
    small = ["workload.duration_s=30", "cluster.nodes=2"]  # enough for a scale-out
    rows = study_table(study, folders("live_fidelity", tmp_path, keep, *small))
    table = sim_vs_live(rows)
    assert list(table.measure) == ["ttft_p50_s", "ttft_p90_s", "scale_out_s", "gpu_seconds"]
    assert set(table.case) == {"2 nodes, timed"}
    assert set(table.backend) == {"sim and live-timed"}
    assert (table.live > 0).all()
