"""Weights & Biases as a sink. The only module that imports wandb."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lambdascale.core.checks import check_types, require
from lambdascale.metrics.sinks import FinishedRun


@dataclass(frozen=True, kw_only=True)
class WandbLogger:
    """Report runs to W&B: offline by default, so that it needs neither network nor account.

    ``request_rows``: request tables above this size are sampled to it, seeded by the run. ``directory`` holds wandb's files.
    """

    project: str = "lambdascale"
    entity: str | None = None
    mode: Literal["offline", "online", "disabled"] = "offline"
    directory: str = "results"
    request_rows: int = 2000
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.request_rows >= 0, f"logger.request_rows must not be negative, not {self.request_rows}")

    def log_run(self, run: FinishedRun) -> None:
        """Log configuration, summary, request table, figures and the folder as an artifact, as one finished W&B run."""
        folder = Path(self.directory).resolve() / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        # wandb reads these when it is first imported: everything it writes stays in one folder of ours.
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(variable, str(folder))
        import wandb

        active = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            dir=self.directory,
            name=run.name,
            group=run.group,
            job_type=run.experiment,
            tags=[*self.tags, run.experiment, str(run.summary["backend"])],
            config=dict(run.config),
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        active.summary.update(_flat(run.summary))
        active.log({"requests": wandb.Table(dataframe=self._sample(run))})
        if run.figures:
            active.log({path.stem: wandb.Image(str(path)) for path in run.figures})
        artifact = wandb.Artifact(name=f"run-{active.id}", type="run-folder", metadata={"folder": run.folder.name})
        for path in sorted(run.folder.iterdir()):
            artifact.add_file(str(path))
        active.log_artifact(artifact)
        active.finish()

    def _sample(self, run: FinishedRun) -> pd.DataFrame:
        table = pd.read_parquet(run.folder / "requests.parquet")
        if len(table) <= self.request_rows:
            return table
        return table.sample(self.request_rows, random_state=int(run.config["seed"])).sort_index()


def _flat(summary: Any, prefix: str = "") -> dict[str, Any]:
    """Nested numbers as ``ttft_s.p90``: what W&B can plot over a sweep."""
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
