"""A user's mistake: status 2, one clear line on stderr, no traceback, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lambdascale.cli.guard import run_guarded
from lambdascale.cli.main import main as lambdascale_main
from lambdascale.experiments.jobs import failed
from lambdascale.experiments.mistakes import user_message
from lambdascale.experiments.outcomes import Outcome
from lambdascale.experiments.sweep import main as run_main

ROOT = Path(__file__).resolve().parents[2]
MISTAKES = {
    "a missing trace": (["workload=azure", "workload.path=nowhere.csv"], "nowhere.csv"),
    "no trace named": (["workload=azure"], "workload.path"),
    "a misspelt key": (["sede=2"], "sede"),
    "a misspelt key in a group": (["system.blokcs=3"], "blokcs"),
    "a misspelt group": (["sytem=faasnet"], "unknown key sytem; did you mean system?"),
    "a misspelt part": (["system.strat.sources=2"], "unknown key system.strat; did you mean system.start? (+system.strat=VALUE"),
    "a key unlike all": (["foo=2"], "unknown key foo; a run has backend, cluster"),
    "a key that is added to the run": (["+sede=2"], "unknown key sede"),
    "a key that is added to a part that has no such": (["+system.start.foo=1"], "system.start: MulticastStart has no key foo"),
    "a key of another workload": (["workload=run", "workload.path=x", "+workload.lengths=azure"], "no key lengths (an"),
    "a word that sets nothing": (["e2e_trace"], "'e2e_trace' is not a setting KEY=VALUE: missing EQUAL"),
    "two equal signs": (["a=b=c"], "'a=b=c' is not a setting KEY=VALUE"),
    "a number as a choice": (["backend@x=1"], "a choice of a group is a name"),
    "an unknown option": (["--mulirun"], "unknown option --mulirun"),
    "options between settings": (["workload=burst", "--cfg", "job", "system.blokcs=3"], "blokcs"),
    "a search path that is none": (["hydra.searchpath=[/nowhere]"], "hydra.searchpath: /nowhere is not a folder"),
    "a module that is none": (["system.start.planner._target_=starr.Star"], "cannot import starr.Star: No module named 'starr'"),
    "a class that is none": (["system.start.planner._target_=errno.Star"], "cannot import errno.Star: module 'errno' has no"),
    "a module with a fault": (["system.start.planner._target_=faulty.Star"], "cannot import faulty.Star: NameError: name 'Tru'"),
    "a planner that plans nothing": (["system.start.planner._target_=faulty2.Star"], "faulty2.Star lacks plan of Multicast"),
    "a setting of an earlier version": (["workload=burstgpt", "workload.drop_failures=true"], "workload.failures=drop"),
    "another setting of an earlier version": (
        ["workload=azure", "+workload.zero_tokens=drop", "workload.path=x"],
        "failures=drop",
    ),
    "an unknown system": (["system=blitz"], "blitz"),
    "an unknown model": (["model=gpt5"], "gpt5"),
    "an unknown transport": (["backend=live", "transport=pigeon"], "transport/pigeon"),
    "a transport for the simulated cluster": (["transport=rdma"], "backend=live"),
    "a live cluster with the simulated controller's barrier": (["backend=live", "system=faasnet_prototype"], "barrier_s"),
    "an unknown experiment": (["experiment=fig99"], "fig99"),
    "a negative rate": (["workload=constant", "workload.rate_rps=-1"], "rate"),
    "a rate that is no number": (["workload=constant", "workload.rate_rps=fast"], "rate"),
    "a seed that is no number": (["seed=x"], "seed"),
    "a fraction of a block": (["system.blocks=2.5"], "blocks"),
    "more blocks than layers": (["system.blocks=4096"], "4096"),
    "a model that does not fit the node": (["model=llama2_70b", "cluster=testbed1"], "llama2_70b"),
    "more sources than nodes": (["system.start.sources=13", "autoscaler@system.autoscaler=fixed", "cluster.nodes=3"], "sources"),
    "a zero compression": (["workload.time_compression=0"], "time_compression"),
    "more replicas than nodes": (["system.autoscaler.min_replicas=99"], "min_replicas"),
    "a thousand billion requests": (["workload=burst", "workload.count=1000000000000"], "max_events"),
    "a high rate for long": (["workload=constant", "workload.rate_rps=1e9", "workload.duration_s=1e9"], "max_events"),
    "silence for long": (["workload.duration_s=1e9"], "max_events"),
    "many repetitions": (["workload.repeat=1000000000"], "max_events"),
    "many blocks": (["model.layers=1000000000", "system.blocks=1000000000"], "system.blocks=1000000000"),
    "many nodes": (["cluster.nodes=1000000000"], "cluster.nodes=1000000000"),
    "many models": (["model_count=1000000000"], "model_count=1000000000"),
    "decisions all the time": (["workload=burst", "system.autoscaler.interval_s=1e-9"], "interval_s=1e-09"),
    "requests in 30 billion years": (["workload=burst", "workload.at_s=1e18"], "1e+18 s"),
    "a number that is none": (["workload=burst", "cluster.link_latency_s=nan"], "link_latency_s"),
    "an infinite rate": (["workload=burst", "cluster.nic_bytes_per_s=1e999"], "nic_bytes_per_s"),
    "a planner that is none": (["workload=burst", "system.start.planner=x"], "planner"),
    "a name that leaves its folder": (["workload=burst", "name=../x"], "name"),
    "no nodes": (["cluster.nodes=0"], "nodes"),
    "no models": (["model_count=0"], "model_count"),
    "a budget beyond the host's memory": (["system.memory.budget=100TB"], "budget"),
    "bytes with an unknown unit": (["cluster.nic_bytes_per_s=5 bananas"], "bananas"),
    "a folder that holds something else": (["out=OUT"], "out="),
    "a path that no system has": (['out="a\0b"'], "out must not contain a null byte"),
}


@pytest.fixture(autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of a user's on Python's path."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "faulty.py").write_text("shift = Tru\n")
    (folder / "faulty2.py").write_text("class Star:\n    def __init__(self, **_): pass\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_run(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, about = MISTAKES[mistake]
    occupied = tmp_path / "mine"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("precious")
    arguments = ["workload.duration_s=30"] if not any("workload=" in override for override in overrides) else []
    arguments += [override.replace("OUT", str(occupied)) for override in overrides]
    arguments.append(f"results={tmp_path / 'results'}")
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    monkeypatch.chdir(tmp_path)
    assert run_guarded(lambda: run_main(arguments)) == 2
    complaint = capsys.readouterr().err
    assert about in complaint
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1, "one line"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "thesis.tex"], "nothing else is left"


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["plan"], "--destinations"),
        (["plan", "--destinations", "x"], "x"),
        (["plan", "--destinations", "-1"], "-1"),
        (["plan", "--destinations", "3", "--sources", "0"], "0"),
        (["plan", "--destinations", "3", "--blocks", "0"], "0"),
        (["plan", "--destinations", "3", "--system", "nobody"], "nobody"),
        (["plan", "--destinations", "1000000000"], "1000000000"),
        (["plan", "--destinations", "3", "--blocks", "1000000000000"], "1000000000000"),
        (["fly"], "fly"),
        ([], "COMMAND"),
    ],
)
def test_plan(arguments: list[str], about: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = lambdascale_main(arguments)
    except SystemExit as leaving:
        status = int(str(leaving.code))
    complaint = capsys.readouterr().err
    assert status == 2
    assert about in complaint
    assert complaint.count("\n") == 1


def test_a_simulation_that_does_not_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The count of events ends a run whose estimate was too low: requests wait here, and need more decisions."""
    arguments = ["workload=burst", "system.autoscaler.interval_s=0.01", "max_events=700", f"results={tmp_path}"]
    assert run_guarded(lambda: run_main(arguments)) == 2
    complaint = capsys.readouterr().err
    assert "has had max_events=700 events" in complaint
    assert complaint.count("\n") == 1
    assert not list(tmp_path.rglob("*.parquet"))


def test_output_that_nobody_reads() -> None:
    """A command whose output is cut by another (``| head``) ends without a word."""
    code = "import sys; from lambdascale.cli.guard import run_guarded; sys.exit(run_guarded(lambda: print('x\\n' * 1_000_000)))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.readline()
        command.stdout.close()
        assert command.stderr.read() == ""
    assert command.returncode == 141


@pytest.mark.parametrize("arguments", [["scripts/figures.py", "--only", "fig01_burstiness"], ["scripts/reference.py"]])
def test_an_output_that_cannot_be_written(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, *arguments, "--out", str(tmp_path / "file" / "x")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(tmp_path / "file" / "x") in done.stderr


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["quickstart.py", "system=faasnet"], "system=faasnet: the quickstart compares its five systems"),
        (["quickstart.py", "--sytem"], "unrecognized arguments: --sytem (see quickstart --help)"),
        (["log_wandb.py"], "FOLDER"),
        (["figures.py", "--only", "fig99"], "unknown figure 'fig99'"),
        (["scaleout_parts.py", "nowhere"], "nowhere has no timelines"),
        (["tables.py", "--tables", "nowhere"], "no table"),
    ],
)
def test_scripts(arguments: list[str], about: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert about in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_exploration_checks_its_table_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert lambdascale_main(["explore", "--seeds", "0:1000000", "--out", str(tmp_path / "file")]) == 2
    assert "file/reliability.csv: " in capsys.readouterr().err


def test_a_place_that_the_system_refuses() -> None:
    """Permissions, a full disk: the user's to mend. A file that the package misses is a fault of the package."""
    assert user_message(PermissionError(13, "Permission denied", "/x")) == "/x: Permission denied"
    assert user_message(OSError(28, "No space left on device", "/x")) == "/x: No space left on device"
    assert user_message(FileNotFoundError(2, "No such file or directory", "/x")) is None


def test_a_fault_of_a_job_says_where_to_look() -> None:
    outcome = Outcome(0, "")
    failed(outcome, KeyError("x"))
    assert (outcome.status, outcome.error) == (1, "internal error: KeyError: 'x' (LAMBDASCALE_DEBUG=1 shows where)")
