"""Tables for figures, gathered from finished runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lambdascale.experiments.folder import SUMMARY, read_json


def request_rows(folders: Iterable[Path]) -> pd.DataFrame:
    """What fig10 needs: one row per request of the runs, with their backend."""
    columns = ["model", "system", "arrival_s", "ttft_s"]
    parts = []
    for folder in folders:
        rows = pd.read_parquet(folder / "requests.parquet", columns=columns)
        parts.append(rows.assign(backend=read_json(folder / SUMMARY)["backend"]))
    return pd.concat(parts, ignore_index=True)


def gpu_rows(folders: Iterable[Path]) -> pd.DataFrame:
    """What fig11 needs: GPUs in use as steps, per run and model, closed by the state at the end of the run."""
    parts = []
    for folder in folders:
        summary = read_json(folder / SUMMARY)
        end_s = summary["simulated_s"] if summary["simulated_s"] is not None else summary["wall_s"]
        for model, steps in pd.read_parquet(folder / "gpus.parquet").groupby("model"):
            last = pd.DataFrame({"at_s": [end_s], "gpus": [steps.gpus.iloc[-1]]})
            rows = pd.concat([steps[["at_s", "gpus"]], last], ignore_index=True)
            parts.append(rows.assign(model=model, system=summary["system"], backend=summary["backend"]))
    return pd.concat(parts, ignore_index=True)
