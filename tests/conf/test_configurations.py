"""Every file in conf/ composes into objects, and every experiment runs at a small scale."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pandas as pd
import pytest
from omegaconf import DictConfig, OmegaConf

from lambdascale.core import UserError
from lambdascale.experiments.build import build
from lambdascale.experiments.collect import study_table
from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.experiments.runner import run
from lambdascale.experiments.study import Study, command_lines, expand, load_study
from lambdascale.figures.registry import FIGURES
from lambdascale.live.config import LiveConfig
from tests.conf.points import points

GROUPS = {
    "system": "system",
    "model": "model",
    "cluster": "cluster",
    "backend": "backend",
    "logger": "logger",
    "autoscaler": "autoscaler@system.autoscaler",
    "batching": "batching@system.batching",
    "memory": "memory@system.memory",
    "pool": "pool@backend.pool",
}
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def test_no_group_is_forgotten() -> None:
    tested_elsewhere = {"workload", "experiment", "hydra", "transport"}
    assert {path.name for path in conf_dir().iterdir() if path.is_dir()} == set(GROUPS) | tested_elsewhere


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_builds(group: str, choice: str) -> None:
    build(compose([f"{GROUPS[group]}={choice}"]))


def test_transports() -> None:
    """``transport=`` offers every transport of the live cluster, and the backend's own key overrides it."""
    transports = get_args(get_type_hints(LiveConfig)["transport"])
    assert {path.stem for path in (conf_dir() / "transport").glob("*.yaml")} == set(transports)
    live = ["experiment=fig07_multicast", "backend=live", "backend.checkpoint=tiny", "system.blocks=8"]
    for transport in transports:
        device = "cuda" if transport == "cuda_ipc" else "cpu"
        assert build(compose([*live, f"transport={transport}", f"backend.device={device}"])).backend.transport == transport
        assert compose([*live, "transport=shm", f"backend.transport={transport}"]).backend.transport == transport


CONSTANTS = [path for group in ("cluster", "model") for path in sorted((conf_dir() / group).glob("*.yaml"))]


@pytest.mark.parametrize("path", CONSTANTS, ids=lambda path: path.stem)
def test_constants_name_their_source(path: Path) -> None:
    assert "#" in path.read_text()


def traces(folder: Path) -> Path:
    """Tiny traces under the file names that experiments expect."""
    folder.mkdir(exist_ok=True)
    (folder / "lambdascale_30min_arrivals.txt").write_text("0\n0.5\n0.5\n2\n31\n")
    (folder / "burstgpt_rate_series.txt").write_text("0.2\n")
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    (folder / "AzureLLMInferenceTrace_conv.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    return folder


def debug_scale(experiment: str, tmp_path: Path, *overrides: str) -> DictConfig:
    """The configuration with a workload of seconds. Composed once: composing takes as long as the run."""
    given = [f"experiment={experiment}", f"results={tmp_path}", f"traces={traces(tmp_path / 'traces')}", *overrides]
    config = compose([*given, "cluster.nodes=8"] if "cluster.nodes=64" in overrides else given)
    workload = str(config.workload._target_).rsplit(".", 1)[-1]
    config.workload.update({"Burst": {"count": 20}, "BurstyWorkload": {"duration_s": 60.0}}.get(workload, {}))
    return config


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name != "paper"])
def test_every_experiment_runs(experiment: str, tmp_path: Path) -> None:
    config = debug_scale(experiment, tmp_path)
    result = run(config)
    assert result.folder.parent == tmp_path / "raw" / config.name
    assert result.summary["requests"]["completed"] == result.summary["requests"]["submitted"] > 0


@cache
def study(experiment: str) -> Study:
    """The study of an experiment, composed once for all tests of it."""
    found = load_study([f"experiment={experiment}"])
    assert found is not None
    return found


@cache
def written(experiment: str) -> dict[str, Any]:
    """The study of a file, read without composing anything."""
    return OmegaConf.to_container(OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml")).get("study", {})


# Those of both backends need a machine to themselves: they are no part of the paper's reproduction.
BOTH = [name for name in EXPERIMENTS if any("backend" in grid for grid in written(name).get("grids", ()))]
STUDIES = [name for name in EXPERIMENTS if "grids" in written(name) and name not in BOTH]


def _with_partners(settings: list[list[str]], reference: str) -> list[list[str]]:
    """A pair of runs for the first grids of a study of pairs, with another system where the grid begins with the reference."""
    pairs = []
    for overrides in settings[:6]:
        others = [o for o in overrides if not o.startswith("system=")]
        pairs += [[f"system={reference}", *others], ["system=ideal", *others]]
    return pairs


@pytest.mark.parametrize("experiment", STUDIES)
def test_every_study_makes_its_table(experiment: str, tmp_path: Path) -> None:
    """One run of every grid makes a table with the columns of the committed one."""
    found = study(experiment)
    first = [list(expand(line)[0][1:]) for line in command_lines(found, [f"experiment={experiment}"])]
    first = _with_partners(first, found.reference) if found.reference else first
    runs = [run(debug_scale(experiment, tmp_path, *overrides)).folder for overrides in first]
    table = study_table(found, runs)
    stem = conf_dir().parent / "results" / "tables" / experiment
    committed = pd.read_csv(f"{stem}.csv") if Path(f"{stem}.csv").exists() else pd.read_parquet(f"{stem}.parquet")
    assert list(table.columns) == list(committed.columns)
    assert table.groupby(["model", "system"]).ngroups >= 1
    assert set(committed.backend) == {"sim"}


@pytest.mark.parametrize("experiment", [name for name in STUDIES if written(name).get("live")])
def test_live_grids_compose(experiment: str) -> None:
    lines = command_lines(study(experiment), [f"experiment={experiment}", "backend=live"])
    config = compose(expand(lines[0])[0])
    assert config.backend._target_.endswith("LiveConfig")
    assert config.cluster.name == "desk"


@pytest.mark.parametrize("experiment", [name for name in STUDIES if written(name).get("live") == []])
def test_a_study_without_live_runs_says_so(experiment: str) -> None:
    with pytest.raises(UserError, match=f"experiment {experiment} has no runs for backend=live"):
        command_lines(study(experiment), [f"experiment={experiment}", "backend=live"])


@pytest.mark.parametrize("experiment", STUDIES)
def test_live_runs_are_inherited_by_figures_only(experiment: str) -> None:
    """Another study of the same load has live runs of its own, or none."""
    assert experiment.startswith("fig") or not study(experiment).live or "live" in written(experiment)


@pytest.mark.parametrize("experiment", BOTH)
def test_studies_of_both_backends_run_the_same_configurations(experiment: str, tmp_path: Path) -> None:
    """Every live run has its simulated one: equal but for the backend. One of each kind of rows is made by simulation."""
    found = study(experiment)
    pairs: dict[str, list[str]] = {"sim": [], "live": []}
    for point in points(found, experiment):
        config = compose([f"experiment={experiment}", *point])
        kind = "live" if config.backend._target_.endswith("LiveConfig") else "sim"
        config.backend = None
        pairs[kind].append(OmegaConf.to_yaml(config, resolve=True))
    assert sorted(pairs["live"]) == sorted(pairs["sim"])
    first = next(point for point in points(found, experiment) if "backend=sim" in point)
    table = study_table(found, [run(debug_scale(experiment, tmp_path, *first)).folder])
    assert set(found.fields) <= set(table.columns)


def test_the_paper_is_made_of_studies() -> None:
    assert set(study("paper").experiments) == set(STUDIES), "every study is part of it"
    assert set(FIGURES) <= set(STUDIES), "every figure has its study"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_says_how_to_run_it(experiment: str) -> None:
    head = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text().split("defaults:")[0]
    assert "scripts/" in head, "the command"
    assert "imulated" in head, "what is simulated, and how long it takes"


def test_building_a_live_configuration_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDASCALE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    build(compose(["backend=live", "backend.checkpoint=tiny", "system.blocks=8"]))
    assert not list(tmp_path.rglob("*"))
