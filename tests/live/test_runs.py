"""Experiments with backend=live: the same run folder as in simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hydra.errors import HydraException

from lambdascale.checkpoints.builtin import builtin_model
from lambdascale.core import UserError
from lambdascale.core.commands import LoadBlocks, StartMulticast
from lambdascale.core.events import BlockArrived
from lambdascale.experiments.build import Experiment, build
from lambdascale.experiments.compose import compose
from lambdascale.experiments.mistakes import user_message
from lambdascale.experiments.runner import drive_experiment, run
from lambdascale.metrics import Recorder
from tests.ray_turn import ray_turn

pytestmark = pytest.mark.live
TINY = ["backend.checkpoint=tiny", "system.blocks=8", "cluster.nic_bytes_per_s=1MB/s", "workload.count=24"]
LIVE = ["experiment=live_burst", "backend=live", *TINY, "workload.output_tokens=100"]


def test_a_run_folder_like_any_other(tmp_path: Path) -> None:
    result = run(compose([*LIVE, f"out={tmp_path / 'run'}"]))
    files = {path.name for path in result.folder.iterdir()}
    assert {"config.yaml", "manifest.json", "requests.parquet", "events.parquet", "summary.json"} <= files
    summary = json.loads((result.folder / "summary.json").read_text())
    assert (summary["backend"], summary["requests"]["completed"], summary["simulated_s"]) == ("live", 24, None)
    rows = pd.read_parquet(result.folder / "requests.parquet")
    assert (rows.output_tokens == 100).all()
    assert (rows.ttft_s > 0).all()
    assert run(compose([*LIVE, f"out={tmp_path / 'run'}"])).reused


# A host copy feeds others, and is loaded beside that; a GPU and a host copy feed one node each; nodes load from storage.
SLOW_PCIE = ["cluster.pcie_bytes_per_s=0.3MB/s", "cluster.ssd_bytes_per_s=0.5MB/s", "system.memory.enabled=true"]
SLOW_PCIE += ["system.memory.keep_alive_s=null", "system.memory.initial_copies=1", "cluster.rdma_efficiency=1.0"]


@pytest.mark.parametrize(
    ("system", "replicas"), [("lambdascale", 0), ("faasnet", 1), ("faasnet", 0), ("serverlessllm", 0), ("nccl_broadcast", 0)]
)
def test_no_transfer_is_faster_than_simulated(system: str, replicas: int) -> None:
    """Each takes every way that it takes in the simulator, but for 10 %: link, PCIe and storage, alone or beside another."""
    shared = [*LIVE, *SLOW_PCIE, f"system={system}", f"system.autoscaler.min_replicas={replicas}", "cluster.nodes=4"]
    shared += ["workload.at_s=1.05", "logger._target_=builtins.dict"]
    live_run = build(compose([*shared, "backend.executor=timed"]))
    simulation = replace(live_run, backend=build(compose(["backend=sim"])).backend, configured=live_run.models)
    live, simulated = transfers_s(live_run), transfers_s(simulation)
    assert live.keys() == simulated.keys()
    for key, took_s in simulated.items():
        assert live[key] >= 0.9 * took_s, f"{key}: {live} {simulated}"


def transfers_s(experiment: Experiment) -> dict[tuple[str, int], float]:
    """Return the seconds from each command of a transfer to the last block of each node that it brings blocks to."""
    recorder = Recorder()
    requests = experiment.workload.requests(models=[model.name for model in experiment.models], seed=1)
    drive_experiment(experiment, requests, 1, recorder)
    began, took = {}, {}
    for at, entry in recorder.entries:
        if isinstance(entry, StartMulticast | LoadBlocks):
            began[entry.transfer_id] = type(entry).__name__, at
        elif isinstance(entry, BlockArrived):
            kind, since = began[entry.transfer_id]
            took[kind, entry.node] = at - since
    return took


@pytest.mark.parametrize(("system", "communicator"), [("lambdascale", None), ("nccl_broadcast", "gloo")])
def test_timed_nodes_say_so(tmp_path: Path, system: str, communicator: str | None) -> None:
    settings = [f"system={system}", "backend.executor=timed", "cluster.nodes=6", f"out={tmp_path / 'run'}"]
    result = run(compose([*LIVE, *settings]))
    assert result.summary["backend"] == "live-timed"
    assert json.loads((result.folder / "manifest.json").read_text())["communicator"] == communicator
    assert result.summary["requests"]["completed"] == 24


def test_the_model_of_the_configuration_is_the_one_on_disk() -> None:
    """conf/model/smollm2.yaml has the packed model's sizes."""
    config = compose(["backend=live"])
    try:
        packed = builtin_model("smollm2", 16)
    except UserError as error:
        pytest.skip(str(error))
    simulated = build(compose(["model=smollm2"])).models[0]
    assert packed.spec == simulated
    assert build(config).models == (simulated,)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["backend.checkpoint=/nowhere"], "/nowhere"),
        (["backend.slot_tokens=64"], "64"),
        (["backend.slot_tokens=9999"], "9999"),
        (["backend.transport=pigeon"], "pigeon"),
        (["backend.executor=guess"], "guess"),
        (["backend.collective=mpi"], "mpi"),
        (["backend.collective=nccl"], "needs device cuda"),
        (["backend.transport=cuda_ipc"], "needs device cuda"),
        (["model=llama2_70b"], "takes 4 GPUs, and a live node is one GPU"),
    ],
)
def test_mistakes(overrides: list[str], says: str) -> None:
    with pytest.raises((UserError, HydraException)) as caught:
        run(compose([*LIVE, "out=/nowhere/at/all", *overrides]))
    message = user_message(caught.value)
    assert message is not None
    assert says in message


@pytest.fixture
def ray_cluster() -> Iterator[None]:
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        pytest.skip("Ray is not installed (extra ray)")
    options = ["--head", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    with ray_turn():
        subprocess.run([ray, "start", *options], check=True, capture_output=True, timeout=120)
        yield
        subprocess.run([ray, "stop", "--force"], check=True, capture_output=True, timeout=120)


@pytest.mark.slow
def test_nodes_placed_by_ray(ray_cluster: None, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "scripts/run.py",
        *LIVE,
        "backend.launcher=ray",
        "transport=tcp",
        f"out={tmp_path / 'run'}",
    ]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["requests"]["completed"] == 24


def test_without_a_ray_cluster(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/run.py", *LIVE, "backend.launcher=ray", f"out={tmp_path / 'run'}"]
    root = Path(__file__).resolve().parents[2]
    with ray_turn():
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "ray start --head" in done.stderr or "lambdascale[ray]" in done.stderr
