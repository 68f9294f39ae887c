"""Runs and sweeps as a user sees them: folders, reuse, repetition, and a death in the middle."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lambdascale.core import UserError
from lambdascale.experiments import manifest, runner
from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.experiments.runner import RunResult, run

RUN = conf_dir().parent / "scripts" / "run.py"
SMALL = ["workload.duration_s=30"]
FOLDER = {"config.yaml", "manifest.json", "requests.parquet", "events.parquet", "gpus.parquet", "summary.json"}


def small_run(tmp_path: Path, *overrides: str) -> RunResult:
    return run(compose([*SMALL, f"results={tmp_path}", *overrides]))


def script(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), *overrides]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)


def test_the_garbage_collector_spares_what_exists_until_a_simulation_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = []

    def fails(*_: object, **__: object) -> None:
        frozen.append(gc.get_freeze_count())
        raise UserError("the simulation fails")

    monkeypatch.setattr(runner, "drive", fails)
    with pytest.raises(UserError, match="the simulation fails"):
        small_run(tmp_path)
    assert frozen[0] > 1000
    assert gc.get_freeze_count() == 0


def test_a_folder_is_complete_and_says_what_it_is(tmp_path: Path) -> None:
    result = small_run(tmp_path)
    assert {path.name for path in result.folder.iterdir()} == FOLDER
    notes = json.loads((result.folder / "manifest.json").read_text())
    assert notes["backend"] == "sim"
    assert {"git", "versions", "host", "seed", "hardware_profile", "wall_s", "command"} <= set(notes)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert {"requests", "ttft_s", "tpot_s", "gpu_seconds", "cost_usd", "scale_outs", "backend", "simulated_s", "wall_s"} <= set(
        summary
    )


def test_a_summary_names_the_largest_communicator_whose_set_up_was_drawn(tmp_path: Path) -> None:
    burst = ["workload=burst", "workload.count=60", "system.autoscaler.target_per_replica=1", "system.memory.initial_copies=0"]

    def setup(*overrides: str) -> object:
        found = run(compose([*burst, "cluster.nodes=9", f"results={tmp_path}", *overrides]))
        return found.summary["communicator_setup"]

    assert setup("system=nccl_broadcast") == {"ranks": 9, "basis": "one sample"}
    assert setup("system=nccl_broadcast", "backend.transfers.communicator_setup=false") is None
    assert setup("system=nccl_broadcast", "backend.transfers.broadcast_s=[0.5]") is None, "a sleep has no set-up"
    assert setup("system=lambdascale") is None


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    seeds = {
        name: small_run(tmp_path / name, f"seed={seed}", "system=nccl_broadcast") for name, seed in [("a", 5), ("b", 5), ("c", 6)]
    }
    events = {name: (result.folder / "events.parquet").read_bytes() for name, result in seeds.items()}
    assert events["a"] == events["b"]
    assert events["a"] != events["c"]


class TestReuse:
    def test_a_finished_run_is_found_again(self, tmp_path: Path) -> None:
        first, second = small_run(tmp_path), small_run(tmp_path)
        assert (first.reused, second.reused) == (False, True)
        assert first.summary == second.summary

    def test_where_results_go_is_no_part_of_a_run(self, tmp_path: Path) -> None:
        small_run(tmp_path, f"out={tmp_path / 'x'}")
        assert small_run(
            tmp_path, f"out={tmp_path / 'x'}", "logger.project=p", "logger=wandb", f"logger.directory={tmp_path}"
        ).reused

    def test_force_runs_again(self, tmp_path: Path) -> None:
        first = small_run(tmp_path)
        again = small_run(tmp_path, "force=true")
        assert not again.reused
        assert again.folder == first.folder
        assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]

    @pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:9] + b"x" + data[10:]], ids=["cut", "changed"])
    def test_a_damaged_run_is_not_reused(self, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
        folder = small_run(tmp_path).folder
        for name in FOLDER - {"manifest.json"}:
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(damage(whole))
            with pytest.raises(UserError, match=rf"is damaged: {name}"):
                small_run(tmp_path)
            (folder / name).write_bytes(whole)
        assert small_run(tmp_path).reused
        (folder / "events.parquet").unlink()
        assert not small_run(tmp_path, "force=true").reused

    def test_a_damaged_manifest(self, tmp_path: Path) -> None:
        path = small_run(tmp_path, f"out={tmp_path / 'x'}").folder / "manifest.json"
        path.write_text(path.read_text()[:-9])
        with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
            small_run(tmp_path, f"out={tmp_path / 'x'}")

    def test_changed_code_is_another_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        small_run(tmp_path)
        monkeypatch.setattr("lambdascale.experiments.manifest.code_digest", lambda: "other")
        assert not small_run(tmp_path).reused

    def test_a_changed_trace_is_another_run(self, tmp_path: Path) -> None:
        trace = tmp_path / "arrivals.txt"
        arrivals = ["workload=arrivals", f"workload.path={trace}"]
        trace.write_text("0\n1\n")
        run(compose([*arrivals, f"results={tmp_path}"]))
        trace.write_text("0\n2\n")
        assert not run(compose([*arrivals, f"results={tmp_path}"])).reused

    def test_the_digest_covers_the_code(self) -> None:
        assert len(manifest.code_digest()) == 64


class TestOut:
    def test_out_is_the_folder(self, tmp_path: Path) -> None:
        assert small_run(tmp_path, f"out={tmp_path / 'here'}").folder == tmp_path / "here"

    def test_another_configuration_does_not_replace_it(self, tmp_path: Path) -> None:
        small_run(tmp_path, f"out={tmp_path / 'here'}")
        with pytest.raises(ValueError, match="not a finished run of this configuration"):
            small_run(tmp_path, f"out={tmp_path / 'here'}", "seed=9", "force=true")


class TestSweeps:
    @pytest.mark.parametrize("launcher", [(), ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")], ids=["serial", "joblib"])
    def test_every_combination(self, tmp_path: Path, launcher: tuple[str, ...]) -> None:
        done = script(tmp_path, *SMALL, "system=ideal,lambdascale", "seed=1,2", *launcher, "-m")
        assert done.returncode == 0, done.stderr
        runs = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "results" / "raw" / "run").iterdir()}
        assert len(runs) == 4
        assert "simulated" in done.stdout
        assert sorted(path.name for path in tmp_path.iterdir()) == ["results"], "Hydra leaves nothing lying about"

    def test_one_failing_job_does_not_take_the_others_along(self, tmp_path: Path) -> None:
        done = script(tmp_path, *SMALL, "system.blocks=16,4096", "-m")
        assert done.returncode == 2
        assert "4096" in done.stderr
        assert len(list((tmp_path / "results" / "raw" / "run").iterdir())) == 1


def test_a_killed_run_looks_unfinished_and_can_be_repeated(tmp_path: Path) -> None:
    """SIGKILL at the worst moment, while the folder is being written."""
    code = (
        "import os, signal, sys\n"
        "from lambdascale.experiments import runner\n"
        "from lambdascale.experiments.compose import compose\n"
        "runner.write_json = lambda path, document: os.kill(os.getpid(), signal.SIGKILL)\n"
        "runner.run(compose(sys.argv[1:]))\n"
    )
    arguments = [*SMALL, f"results={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    kept = tmp_path / "raw" / "run"
    assert all(path.name.startswith(".") for path in kept.iterdir()), "only a temporary folder is left"
    again = small_run(tmp_path)
    assert not again.reused
    assert [path.name for path in kept.iterdir()] == [again.folder.name], "what the killed run left is removed"


def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    """The folder is complete or does not exist after a SIGKILL, whenever it comes."""
    for delay_s in (1.5, 2.5, 3.0):
        process = subprocess.Popen([sys.executable, str(RUN), "seed=7"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for folder in (tmp_path / "results" / "raw" / "run").glob("[!.]*"):
            assert {path.name for path in folder.iterdir()} == FOLDER
    done = script(tmp_path, "seed=7")
    assert done.returncode == 0, done.stderr
