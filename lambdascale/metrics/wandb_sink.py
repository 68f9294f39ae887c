"""Weights & Biases as a sink. The only module that imports wandb."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lambdascale.core import UserError
from lambdascale.core.checks import check_types, require
from lambdascale.metrics.over_time import over_time
from lambdascale.metrics.sinks import FinishedRun

# File that marks a W&B run's folder as complete; an incomplete one is deleted and logged again.
_COMPLETE = "lambdascale-complete"
# Description of a run of each backend.
_KINDS = {
    "sim": "Simulated: decisions are the control plane's, times come from the model of cluster {cluster}, not from hardware.",
    "live": "Live: real processes, bytes and tokens on {host}, as cluster {cluster}.",
    "live-paced": "Live, computation slowed to the model of cluster {cluster}: real processes, bytes and tokens on {host}.",
    "live-timed": "Live, computation replaced by waits from the model of {cluster}: real processes and bytes on {host}.",
}


@dataclass(frozen=True, kw_only=True)
class WandbLogger:
    """Report runs to W&B: offline by default, so that it needs neither network nor account.

    ``group`` replaces the sweep's group; ``tags`` are added to the run's own. Request tables of more than ``request_rows`` rows
    are sampled to that size, seeded by the run. ``directory`` holds wandb's files, which also record the runs logged before.
    """

    project: str = "lambdascale"
    entity: str | None = None
    group: str | None = None
    mode: Literal["offline", "online", "disabled"] = "offline"
    directory: str = "results"
    request_rows: int = 2000
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.request_rows >= 0, f"logger.request_rows must not be negative, not {self.request_rows}")

    def log_run(self, run: FinishedRun) -> bool:
        """Log configuration, summary, curves, request table, figures and the folder, as one finished W&B run.

        Return False if this execution of the run was logged before, True otherwise. UserError if W&B reports an error.
        """
        run_id = _run_id(run)
        if self._is_logged(run_id):
            return False
        self._keep_files_together()
        import wandb

        requests = pd.read_parquet(run.folder / "requests.parquet")
        sample = self._sample(requests, int(run.config["seed"]))
        try:
            active = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                dir=self.directory,
                id=run_id,
                name=run.folder.name,
                group=self.group or run.group,
                job_type=_job_type(run),
                tags=_tags(run, self.tags),
                notes=notes(run, len(sample), len(requests)),
                config={**run.config, "run": _origin(run)},
                reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True),
            )
            _log_curves(active, run, requests)
            # Lists of gaps between tokens make no column of a table; the artifact has them.
            active.log({"requests": wandb.Table(dataframe=sample.drop(columns="itl_s", errors="ignore"))})
            with tempfile.TemporaryDirectory() as scratch:
                for path in run.draw(Path(scratch)):
                    active.log({path.stem: wandb.Image(str(path))})
            artifact = wandb.Artifact(name=f"run-{run_id}", type="run-folder", metadata=_origin(run))
            for path in sorted(path for path in run.folder.rglob("*") if path.is_file()):
                artifact.add_file(str(path), name=path.relative_to(run.folder).as_posix())
            active.log_artifact(artifact)
            active.summary.update(flat_summary(run.summary) | {"requests_logged": len(sample), "requests_total": len(requests)})
            active.finish()
            # wandb's service may still write after finish(); teardown() waits until it has ended.
            wandb.teardown()
        except wandb.errors.Error as error:
            raise UserError(f"W&B: {error} (logger.mode=offline needs no account; {run.folder} is complete)") from error
        for folder in self._folders(run_id):
            (folder / _COMPLETE).touch()
        return True

    def _folders(self, run_id: str) -> list[Path]:
        return sorted(Path(self.directory, "wandb").glob(f"*run-*-{run_id}"))

    def _is_logged(self, run_id: str) -> bool:
        """True if a complete report exists; incomplete ones are deleted."""
        folders = self._folders(run_id)
        if any((folder / _COMPLETE).is_file() for folder in folders):
            return True
        for folder in folders:
            shutil.rmtree(folder)
        return False

    def _keep_files_together(self) -> None:
        """Set the folder variables that wandb reads on its first import, so that all it writes stays in one folder."""
        folder = Path(self.directory).resolve() / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(variable, str(folder))

    def _sample(self, requests: pd.DataFrame, seed: int) -> pd.DataFrame:
        if len(requests) <= self.request_rows:
            return requests
        return requests.sample(self.request_rows, random_state=seed).sort_index()


def _run_id(run: FinishedRun) -> str:
    """Identifier of one execution of a run: the same when the run is reused, a new one after ``force=true``."""
    return hashlib.sha256(f"{run.manifest['run_sha256']} {run.manifest['started']}".encode()).hexdigest()[:16]


def _job_type(run: FinishedRun) -> str:
    backend = str(run.summary["backend"])
    return "simulated" if backend == "sim" else backend


def _tags(run: FinishedRun, more: tuple[str, ...]) -> list[str]:
    """Tags to filter runs by, without duplicates, each cut to W&B's limit of 64 characters."""
    parts = [str(run.config[key]["name"]) for key in ("system", "model", "cluster")]
    tags = [run.config["name"], _job_type(run), *parts, *run.config.get("tags", ()), *more]
    return list(dict.fromkeys(str(tag)[:64] for tag in tags if tag))


def notes(run: FinishedRun, logged: int, total: int) -> str:
    """Note on a run: what is simulated or live in it, the number of request rows logged, and its folder."""
    kind = _KINDS[run.summary["backend"]].format(cluster=run.config["cluster"]["name"], host=run.manifest["host"]["name"])
    return f"{kind} Request table: {logged} of {total} rows. Folder: {run.folder}."


def _origin(run: FinishedRun) -> dict[str, Any]:
    """Folder, digest, commit, host and start time of the run."""
    manifest = run.manifest
    return {
        "folder": str(run.folder),
        "sha256": manifest["run_sha256"],
        "git_sha": manifest["git"]["sha"],
        "git_dirty": manifest["git"]["dirty"],
        "host": manifest["host"]["name"],
        "started": manifest["started"],
    }


def _log_curves(active: Any, run: FinishedRun, requests: pd.DataFrame) -> None:
    """Log curves over the run's own time, so that W&B can overlay those of many runs."""
    end_s = run.summary["simulated_s"] if run.summary["simulated_s"] is not None else run.summary["wall_s"]
    active.define_metric("over_time/time_s", summary="none")
    active.define_metric("over_time/*", step_metric="over_time/time_s", summary="none")
    for row in over_time(requests, pd.read_parquet(run.folder / "gpus.parquet"), end_s).to_dict("records"):
        active.log({f"over_time/{name}": value for name, value in row.items() if value == value})


def flat_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of summary.json under the names they have in the tables: ttft_p90_s, tpot_mean_s, requests_failed, gpu_seconds.

    The numbers of each model, in a run of several, are named model/NAME/ttft_p90_s.
    """
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        if key == "per_model":
            for model, numbers in value.items():
                flat |= {f"model/{model}/{name}": number for name, number in flat_summary(numbers).items()}
        elif isinstance(value, Mapping):
            stem, unit = (key.removesuffix("_s"), "_s") if key.endswith("_s") else (key, "")
            flat |= {f"{stem}_{name}{unit}": number for name, number in value.items()}
        else:
            flat[key] = value
    return flat
