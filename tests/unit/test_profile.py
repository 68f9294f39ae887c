"""A measured profile is a configuration that the simulator accepts unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lambdascale.calibration.sharing import slowdowns
from lambdascale.checkpoints import pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.cli.main import main
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.experiments.runner import run


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of conf/ with a profile of this machine for a tiny model."""
    root = tmp_path_factory.mktemp("profile")
    shutil.copytree(conf_dir(), root / "conf")
    (root / "source").mkdir()
    write_random(PRESETS["tiny"], root / "source", seed=0)
    pack(root / "source", root / "mite", 4)
    arguments = ["--model", str(root / "mite"), "--model-configs", str(root / "conf" / "model" / "measured")]
    out = root / "conf" / "cluster" / "measured" / "here.yaml"
    assert main(["profile", "--out", str(out), "--quick", "--sharing", "3", "--nodes", "3", "--disk", str(root), *arguments]) == 0
    return root / "conf"


def test_the_simulator_takes_it(conf: Path, tmp_path: Path) -> None:
    overrides = ["cluster=measured/here", "model=measured/mite", "workload=burst", "system.blocks=4", f"results={tmp_path}"]
    experiment = build(compose(overrides, directory=conf))
    assert experiment.cluster.nodes == 3
    assert experiment.cluster.provenance.startswith("measured ")
    (table,) = experiment.cluster.compute.measured
    assert table.model == experiment.models[0].name == "mite"
    assert min(*table.prefill_s, *table.decode_s) > 0
    first, second, third = experiment.cluster.compute.shared_slowdown
    assert first == 1.0 <= second <= third
    result = run(compose(overrides, directory=conf))
    assert result.summary["requests"]["completed"] == result.summary["requests"]["submitted"] > 0
    assert '"provenance": "measured ' in (result.folder / "manifest.json").read_text()


def test_it_says_where_and_when(conf: Path) -> None:
    head = (conf / "cluster" / "measured" / "here.yaml").read_text().splitlines()[1]
    assert "torch" in head
    assert "UTC on" in head


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["--out", "x.txt"], ".yaml"),
        (["--out", "x.yaml", "--nodes", "0"], "--nodes"),
        (["--out", "x.yaml", "--sharing", "0"], "--sharing"),
        (["--out", "x.yaml", "--sharing", "2", "--device", "cuda"], "--device cpu"),
        (["--out", "x.yaml", "--disk", "nowhere"], "nowhere"),
        (["--out", "x.yaml", "--model", "nowhere"], "nowhere is not a packed model"),
    ],
)
def test_mistakes(
    arguments: list[str], about: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *arguments]) == 2
    assert about in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_slowdowns_are_against_one_alone_and_do_not_fall() -> None:
    assert slowdowns([[10.0], [8.0, 8.0], [9.0, 8.0, 10.0], [4.0, 5.0, 4.0, 3.0]]) == (1.0, 1.25, 1.25, 2.5)
