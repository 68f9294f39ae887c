"""An offline W&B run, read back with wandb's own record format."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lambdascale.experiments.compose import conf_dir

RUN = conf_dir().parent / "scripts" / "run.py"


def records(path: Path) -> Iterator[object]:
    """The records of a .wandb file: LevelDB's log format (32 KiB pages of checksum, length, type, data) after a 7-byte head."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            position += left
            continue
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    overrides = ["logger=wandb", "logger.request_rows=10", "workload.duration_s=60", "system=ideal,lambdascale", "-m"]
    done = subprocess.run(
        [sys.executable, str(RUN), *overrides], cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_sweep_is_one_group_of_finished_runs(sweep: Path) -> None:
    files = sorted(sweep.glob("results/wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    runs = [next(r.run for r in records(path) if r.HasField("run")) for path in files]  # type: ignore[attr-defined]
    assert len({run.run_group for run in runs}) == 1
    assert {run.display_name.split("-")[0] for run in runs} == {"ideal", "lambdascale"}
    assert {run.job_type for run in runs} == {"run"}
    exits = [[r.exit.exit_code for r in records(path) if r.HasField("exit")] for path in files]  # type: ignore[attr-defined]
    assert exits == [[0], [0]]


def test_config_summary_and_artifact(sweep: Path) -> None:
    path = sorted(sweep.glob("results/wandb/offline-run-*/run-*.wandb"))[0]
    config: dict[str, object] = {}
    summary: dict[str, object] = {}
    artifacts: list[set[str]] = []
    for record in records(path):
        for item in record.run.config.update if record.HasField("run") else []:  # type: ignore[attr-defined]
            config[item.key] = json.loads(item.value_json)
        for item in record.summary.update if record.HasField("summary") else []:  # type: ignore[attr-defined]
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("request") and record.request.HasField("log_artifact"):  # type: ignore[attr-defined]
            artifacts.append({entry.path for entry in record.request.log_artifact.artifact.manifest.contents})  # type: ignore[attr-defined]
        elif record.HasField("artifact"):  # type: ignore[attr-defined]
            artifacts.append({entry.path for entry in record.artifact.manifest.contents})  # type: ignore[attr-defined]
    assert config["model"]["name"] == "llama2_13b"  # type: ignore[index]
    assert summary["backend"] == "sim"
    assert isinstance(summary["ttft_s.p90"], float)
    assert any({"summary.json", "requests.parquet", "config.yaml"} <= contents for contents in artifacts)


def test_everything_wandb_writes_is_in_its_folder(sweep: Path) -> None:
    assert [path.name for path in sweep.iterdir()] == ["results"]
    assert sorted(path.name for path in (sweep / "results").iterdir()) == ["raw", "wandb"]
