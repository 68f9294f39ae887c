"""Studies: meaning of command lines, rows of their tables, and the comparison with the paper."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lambdascale.core import UserError
from lambdascale.experiments.collect import write_frame
from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.experiments.study import Study, as_published, command_lines, expand, in_pool, load_study
from lambdascale.metrics.scaleouts import host_copies, loads_by_tier, scale_out_durations, scale_out_times

ROOT = conf_dir().parent
TABLES = ROOT / "results" / "tables"
STUDY = Study(grids=({"system": "a,b", "seed": 1}, {"system": "c", "seed": 1}), rows="summary")


class TestCommandLines:
    def test_one_for_every_grid(self) -> None:
        assert command_lines(STUDY, ["experiment=x"]) == [
            ["experiment=x", "system=a,b", "seed=1"],
            ["experiment=x", "system=c", "seed=1"],
        ]

    def test_what_the_user_sets_takes_the_grids_place_and_grids_that_become_equal_are_one(self) -> None:
        assert command_lines(STUDY, ["experiment=x", "system=d"]) == [["experiment=x", "system=d", "seed=1"]]

    def test_values_are_written_as_hydra_reads_them(self) -> None:
        study = Study(grids=({"a": None, "b": True, "c": "null"},), rows="summary")
        assert command_lines(study, [])[0] == ["a=null", "b=true", "c=null"]

    def test_runs_are_all_combinations(self) -> None:
        line = ["experiment=x", "a=1,2", "b=[[0,1]],[]", "c@d=e", "++f='g,h'"]
        assert expand(line) == [
            ("experiment=x", f"a={a}", f"b={b}", "c@d=e", "++f='g,h'") for a in "12" for b in ("[[0,1]]", "[]")
        ]

    def test_runs_that_cannot_be_read(self) -> None:
        with pytest.raises(UserError, match=r"^a=\[: "):
            expand(["a=["])

    @pytest.mark.parametrize(
        ("own", "pooled"),
        [([], True), (["hydra/launcher=slurm"], False), (["hydra.launcher.n_jobs=2"], False), (["backend=live"], False)],
    )
    def test_the_pool_makes_what_neither_a_launcher_nor_a_live_cluster_does(self, own: list[str], pooled: bool) -> None:
        assert in_pool(["experiment=x", *own, "seed=1,2"]) == pooled

    def test_live_has_grids_of_its_own_or_says_so(self) -> None:
        with pytest.raises(UserError, match="no runs for backend=live"):
            command_lines(STUDY, ["experiment=x", "backend=live"])

    def test_a_study_of_both_backends(self) -> None:
        """A chosen backend leaves the other's grids out, and never replaces a grid's; the machine is a live run's alone."""
        study = Study(grids=({"backend": "sim", "seed": "1,2"}, {"backend": "live", "++a": 1}), rows="measures")
        simulated, live = ["experiment=x", "backend=sim", "seed=1,2"], ["experiment=x", "backend=live", "++a=1"]
        assert command_lines(study, ["experiment=x"]) == [simulated, live]
        assert (in_pool(simulated), in_pool(live)) == (True, False)
        assert command_lines(study, ["experiment=x", "backend=live", "a=2"]) == [["experiment=x", "backend=live", "a=2"]]
        assert command_lines(study, ["backend=sim"]) == [["backend=sim", "seed=1,2"]]

    @pytest.mark.parametrize(
        ("overrides", "published"),
        [
            (
                ["experiment=x", "results=here", "hydra/launcher=basic", "hydra.launcher.n_jobs=2", "traces=d", "logger=wandb"],
                True,
            ),
            (["experiment=x", "logger.mode=online", "force=true"], True),
            (["experiment=x", "seed=2"], False),
            (["experiment=x", "backend=live"], False),
        ],
    )
    def test_only_the_study_as_it_is_replaces_the_committed_table(self, overrides: list[str], published: bool) -> None:
        assert as_published(overrides) == published

    def test_what_is_no_study(self) -> None:
        assert load_study(["experiment=quickstart"]) is None

    def test_a_study_outside_the_checkout(self, tmp_path: Path) -> None:
        (tmp_path / "experiment").mkdir()
        text = (conf_dir() / "experiment" / "fig08_rampup.yaml").read_text()
        (tmp_path / "experiment" / "mine.yaml").write_text(text)
        found = load_study([f"hydra.searchpath=[{tmp_path}]", "experiment=mine"])
        assert found == load_study(["experiment=fig08_rampup"])
        assert found is not None
        assert all(in_pool(line) for line in command_lines(found, [f"hydra.searchpath=[{tmp_path}]", "experiment=mine"]))
        assert load_study(["experiment=fig07_multicast,fig08_rampup"]) is None
        assert load_study([]) is None

    @pytest.mark.parametrize("broken", ["{grids: [{seed: 1}]}", "{grid: [{seed: 1}]}", "{rows: summary}", "{}"])
    def test_a_study_that_makes_no_sense(self, broken: str, tmp_path: Path) -> None:
        from lambdascale.experiments.study import study_of

        with pytest.raises(UserError, match="experiment broken"):
            study_of(compose([f"study={broken}"]), "broken")


class TestScript:
    def script(self, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "run.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)

    def test_a_study_makes_a_table_and_a_figure_and_reuses_its_runs(self, tmp_path: Path) -> None:
        small = [
            "experiment=ablation_order",
            "model=llama2_7b",
            "system.start.planner.order=shift,none",
            "system.start.planner.chunks=contiguous",
            "workload.count=8",
            "-m",
        ]
        first, again = self.script(tmp_path, *small), self.script(tmp_path, *small, "hydra/launcher=basic")
        assert first.returncode == 0, first.stderr
        assert again.returncode == 0, again.stderr
        assert "4 runs, 0 of them reused" in first.stdout
        assert "4 runs, 4 of them reused" in again.stdout
        made = tmp_path / "results" / "raw" / "ablation_order"
        assert len(pd.read_csv(made / "ablation_order.csv")) == 4
        assert (made / "ablation_order.pdf").is_file()
        assert all("grids" not in path.read_text() for path in made.rglob("config.yaml")), "a run does not repeat its study"
        assert not (tmp_path / "results" / "tables").exists(), "a changed study is not the committed one"

    def test_a_missing_trace_is_one_line(self, tmp_path: Path) -> None:
        done = self.script(tmp_path, "experiment=fig10_ttft", "system=ideal", "model=llama2_7b", "hydra/launcher=basic", "-m")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "lambdascale_30min" in done.stderr

    def test_a_mistake_in_one_run_costs_the_table_and_not_the_other_runs(self, tmp_path: Path) -> None:
        done = self.script(tmp_path, "experiment=fig09_sources", "model=llama2_7b", "system.blocks=16,4096", "-m")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "4096" in done.stderr
        assert "fig09_sources: 12 runs, 0 of them reused" in done.stdout
        made = tmp_path / "results" / "raw" / "fig09_sources"
        assert (len(list(made.iterdir())), (made / "fig09_sources.csv").exists()) == (6, False)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_an_ended_command_leaves_no_process(self, number: signal.Signals, tmp_path: Path) -> None:
        run = [sys.executable, str(ROOT / "scripts" / "run.py"), "experiment=azure_trace", "model=llama2_7b", "-m"]
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
        pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # Its processes hold the pipe open: the end of the pipe is the end of all.
        given = ["workload=bursty", "workload.duration_s=7200"]
        ended = subprocess.Popen([*run, *given], cwd=tmp_path, process_group=0, preexec_fn=heard, **pipe)
        while not list(tmp_path.glob("results/raw/**/summary.json")):
            assert ended.poll() is None, ended.communicate()
            time.sleep(0.05)
        os.kill(ended.pid, number)
        ended.communicate(timeout=60)
        assert ended.returncode != 0

    def test_several_studies_need_a_multirun(self, tmp_path: Path) -> None:
        done = self.script(tmp_path, "experiment=paper")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "-m" in done.stderr


def test_the_other_form_of_a_table_gives_way(tmp_path: Path) -> None:
    small, large = pd.DataFrame({"a": [1]}), pd.DataFrame({"a": range(2000)})
    assert write_frame(small, tmp_path / "t").suffix == ".csv"
    assert write_frame(large, tmp_path / "t").suffix == ".parquet"
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_an_interrupted_table_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_frame(pd.DataFrame({"a": [1]}), tmp_path / "t")

    def interrupted(self: pd.DataFrame, path: Path, **_: object) -> None:
        path.write_text("a\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_frame(pd.DataFrame({"a": [2, 3]}), tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    assert old.read_text() == "a\n1\n"


# -- rows of tables ------------------------------------------------------------------------------------------------------


def events(*rows: tuple[float, str, int | None, int | None, int | None, dict[str, object] | None]) -> pd.DataFrame:
    columns = ["at_s", "kind", "node", "transfer_id", "block", "detail"]
    frame = pd.DataFrame([(*row[:5], None if row[5] is None else json.dumps(row[5])) for row in rows], columns=columns)
    return frame.assign(model="m")


def test_times_of_the_first_scale_out() -> None:
    frame = events(
        (0.0, "AllocateNode", 0, None, None, {}),
        (0.0, "BlockArrived", 0, 1, 0, None),
        (1.0, "RequestArrived", None, None, None, None),
        (1.5, "AllocateNode", 1, None, None, {}),
        (1.5, "AllocateNode", 2, None, None, {}),
        (2.0, "BlockArrived", 1, 2, 0, None),
        (2.0, "BlockArrived", 2, 2, 1, None),
        (2.1, "Serve", None, None, None, {"stages": [[1, 0, 0], [2, 1, 1]]}),
        (2.2, "AllocateNode", 3, None, None, {}),
        (2.5, "BlockArrived", 1, 2, 1, None),
        (3.5, "BlockArrived", 2, 2, 0, None),
        (9.0, "BlockArrived", 2, 5, 0, None),
    )
    times = scale_out_times(frame)
    assert (times["start_s"], times["new_nodes"]) == (1.5, 2)
    assert (times["pipeline_s"], times["first_node_s"], times["all_nodes_s"]) == pytest.approx((0.6, 1.0, 2.0))


def test_durations_of_scale_outs() -> None:
    """A duration lasts from the command to the last block; what a run starts with does not count, nor what never arrived."""
    frame = events(
        (0.0, "LoadBlocks", 0, 1, None, {"tier": "instant"}),
        (0.0, "BlockArrived", 0, 1, 0, None),
        (2.0, "StartMulticast", None, 2, None, {"sources": [0]}),
        (2.5, "LoadBlocks", 1, 3, None, {"tier": "host"}),
        (3.0, "BlockArrived", 2, 2, 0, None),
        (5.0, "BlockArrived", 2, 2, 1, None),
        (5.5, "LoadBlocks", 3, 4, None, {"tier": "ssd"}),
        (6.0, "BlockArrived", 1, 3, 0, None),
    ).assign(detail=lambda frame: frame.detail.str.replace(" ", ""))
    assert scale_out_durations(frame) == [3.0, 3.5]


def test_no_scale_out() -> None:
    assert scale_out_times(events((0.0, "AllocateNode", 0, None, None, {})))["new_nodes"] == 0


def test_lives_of_host_copies() -> None:
    host = {"tier": "host", "blocks": [0]}
    frame = events(
        (0.0, "PlaceCopy", 0, None, None, None),
        (4.0, "LoadBlocks", 0, 1, None, host),
        (5.0, "BlockArrived", 0, 1, 0, None),
        (6.0, "LoadBlocks", 1, 2, None, {"tier": "ssd", "blocks": [0]}),
        (20.0, "ReleaseNode", 1, None, None, {"gpus": 1, "keep_host": True}),
        (21.0, "ReleaseNode", 2, None, None, {"gpus": 1, "keep_host": False}),
        (22.0, "EvictBlocks", 1, None, None, {"tier": "host"}),
        (23.0, "ReleaseNode", 0, None, None, {"gpus": 1, "keep_host": True}),
        (26.0, "NodeLost", 0, None, None, None),
        (30.0, "TimerFired", None, None, None, None),
    )
    lives = {(row.node, row.begin_s): row.end_s for row in host_copies(frame, 10.0).itertuples()}
    assert lives == {(0, 0.0): 15.0, (1, 20.0): 22.0, (0, 23.0): 26.0}
    assert loads_by_tier(frame) == {"loads_host": 1, "loads_ssd": 1, "loads_multicast": 0}
    forever = host_copies(frame, None)
    assert set(zip(forever.begin_s, forever.end_s, strict=True)) == {(0.0, 26.0), (20.0, 22.0)}
    lasting = {(row.node, row.begin_s): row.end_s for row in host_copies(frame, 10.0, lasting_nodes=1).itertuples()}
    assert lasting == {(0, 0.0): 26.0, (1, 20.0): 22.0}, "on node 0 only"
