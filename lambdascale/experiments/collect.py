"""Tables for figures, gathered from finished runs. Rows depend only on a run's folder, not on the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from lambdascale.core import UserError
from lambdascale.experiments.folder import SUMMARY, read_json
from lambdascale.experiments.pairs import pair_table, with_intervals
from lambdascale.experiments.setups import setup_text
from lambdascale.experiments.study import PAIRS, WITH_INTERVALS, Study
from lambdascale.metrics import whole
from lambdascale.metrics.scaleouts import host_copies, loads_by_tier, scale_out_durations, scale_out_times
from lambdascale.metrics.ttft_parts import PARTS

# Larger tables are written as parquet, smaller ones as CSV, which people can read and diffs can show.
_CSV_ROWS = 1500


def request_rows(folders: Iterable[Path]) -> pd.DataFrame:
    """Table of fig10: one row per request of the runs, with their backend; times in seconds of the run."""
    return _stacked(folders, _requests)[["model", "system", "arrival_s", "ttft_s", "backend"]]


def gpu_rows(folders: Iterable[Path]) -> pd.DataFrame:
    """Table of fig11: GPUs in use as steps, per run and model, closed by the state at the end of the run."""
    return _stacked(folders, _gpus)


def study_table(study: Study, folders: Sequence[Path]) -> pd.DataFrame:
    """Rows of all runs, with the study's own columns, ``model``, ``system``, ``seed`` and ``backend``; or of all pairs of runs.

    UserError for an unknown kind of rows.
    """
    if study.rows == PAIRS:
        return pair_table(study, folders)
    if study.rows not in ROWS:
        raise UserError(f"study.rows must be one of {', '.join([*ROWS, PAIRS])}, not {study.rows!r}")
    parts = []
    for folder in folders:
        rows = ROWS[study.rows](folder)
        config = OmegaConf.load(folder / "config.yaml")
        assert isinstance(config, DictConfig)
        labels = {name: _selected(config, key) for name, key in study.columns.items()}
        summary = read_json(folder / SUMMARY)
        known = {
            "model": config.model.name,
            "system": config.system.name,
            "setup": setup_text([summary]),
            "backend": summary["backend"],
        }
        kept = rows[list(study.fields)] if study.fields else rows
        labels |= {name: value for name, value in (known | {"seed": config.seed}).items() if name not in kept.columns}
        parts.append(pd.concat([pd.DataFrame(labels, index=kept.index), kept], axis=1))
    table = pd.concat(parts, ignore_index=True)
    return with_intervals(table, study, folders) if study.rows in WITH_INTERVALS else table


def _selected(config: DictConfig, key: str) -> Any:
    value = OmegaConf.select(config, key)
    return str(OmegaConf.to_container(value)) if OmegaConf.is_config(value) else value


def table_folder(experiment: str, results: Path, *, published: bool) -> Path:
    """Folder of a study's table below ``results``."""
    return results / "tables" if published else results / "raw" / experiment


def write_study(experiment: str, table: pd.DataFrame, results: Path, *, published: bool) -> list[Path]:
    """Write the table and, if a figure has that name, draw it; return the paths.

    They go to tables/ and figures/ of ``results``, or to raw/``experiment``/ for a study changed on the command line.
    """
    # Imported here, not in every worker of a sweep: matplotlib takes seconds to import.
    from lambdascale.figures.registry import FIGURES, load_table, render

    tables = table_folder(experiment, results, published=published)
    tables.mkdir(parents=True, exist_ok=True)
    paths = [write_frame(table, tables / experiment)]
    if experiment in FIGURES:
        # Draw from what is written, whose numbers are rounded, as scripts/figures.py does.
        paths += render(experiment, load_table(tables, experiment), results / "figures" if published else tables)
    return paths


def write_frame(table: pd.DataFrame, stem: Path) -> Path:
    """Write a table as CSV or parquet, depending on its size; return the path. A file in the other format is deleted.

    It is written as a whole or not at all; UserError if that fails.
    """
    csv, parquet = stem.with_name(f"{stem.name}.csv"), stem.with_name(f"{stem.name}.parquet")
    if len(table) > _CSV_ROWS:
        with whole(parquet) as temporary:
            table.to_parquet(temporary, index=False, compression="zstd")
        csv.unlink(missing_ok=True)
        return parquet
    with whole(csv) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    parquet.unlink(missing_ok=True)
    return csv


# -- rows of a single run ------------------------------------------------------------------------------------------------


def _stacked(folders: Iterable[Path], rows: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    parts = []
    for folder in folders:
        summary = read_json(folder / SUMMARY)
        parts.append(rows(folder).assign(system=summary["system"], backend=summary["backend"]))
    return pd.concat(parts, ignore_index=True)


def _requests(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "requests.parquet")


def _gpus(folder: Path) -> pd.DataFrame:
    summary = read_json(folder / SUMMARY)
    end_s = summary["simulated_s"] if summary["simulated_s"] is not None else summary["wall_s"]
    parts = []
    for model, steps in pd.read_parquet(folder / "gpus.parquet").groupby("model"):
        last = pd.DataFrame({"at_s": [end_s], "gpus": [steps.gpus.iloc[-1]]})
        parts.append(pd.concat([steps[["at_s", "gpus"]], last], ignore_index=True).assign(model=model))
    return pd.concat(parts, ignore_index=True)


def _summary(folder: Path) -> pd.DataFrame:
    summary = read_json(folder / SUMMARY)
    row = {f"ttft_{name}_s": summary["ttft_s"][name] for name in ("mean", "p50", "p90", "p95", "p99", "p999")}
    row |= {f"e2e_{name}_s": value for name, value in summary["e2e_s"].items()}
    row |= {f"{name}_mean_s": summary[f"{name}_s"]["mean"] for name in ("tpot", "ntpot", "queue")}
    row |= {f"itl_{name}_s": value for name, value in summary.get("itl_s", {}).items()}
    row |= {f"requests_{name}": summary["requests"][name] for name in ("submitted", "completed", "failed")}
    row |= {name: summary[name] for name in ("gpu_seconds", "cost_usd", "scale_outs", "pipeline_first_tokens")}
    row |= {name: summary[name] for name in ("restarts", "preemptions", "host_gb_seconds", "host_cost_usd", "total_cost_usd")}
    row |= {f"starts_{way}": count for way, count in summary["node_starts"].items()}
    row |= {"failures": "; ".join(f"{reason}: {count}" for reason, count in summary["failures"].items())}
    row |= {**summary["rates"], **summary.get("slo", {})}
    return pd.DataFrame([row])


def _parts(folder: Path) -> pd.DataFrame:
    """One row: TTFT, its parts (mean, P50 and P95, in seconds) and GPU time."""
    summary = read_json(folder / SUMMARY)
    row = {f"ttft_{name}_s": summary["ttft_s"][name] for name in ("mean", "p50", "p90")}
    row |= {f"{part}_{name}_s": summary[f"{part}_s"][name] for part in PARTS for name in ("mean", "p50", "p95")}
    return pd.DataFrame([row | {"gpu_seconds": summary["gpu_seconds"], "scale_outs": summary["scale_outs"]}])


def _measures(folder: Path) -> pd.DataFrame:
    """One row: the summary's, the longest TTFT, and the mean duration of scale-outs (0 without one), in seconds."""
    durations = scale_out_durations(pd.read_parquet(folder / "events.parquet"))
    longest = pd.read_parquet(folder / "requests.parquet", columns=["ttft_s"]).ttft_s.max()
    # The mean, since a median would jump between loads from host memory and from disk.
    return _summary(folder).assign(ttft_max_s=longest, scale_out_s=fmean(durations) if durations else 0.0)


def _scale_out(folder: Path) -> pd.DataFrame:
    """One row: the first scale-out of a run, and TTFT and finish times of its requests, in seconds."""
    requests = pd.read_parquet(folder / "requests.parquet", columns=["ttft_s", "finished_s"])
    times = scale_out_times(pd.read_parquet(folder / "events.parquet"))
    waits = {"ttft_p50_s": requests.ttft_s.median(), "ttft_max_s": requests.ttft_s.max(), "finished_s": requests.finished_s.max()}
    return pd.DataFrame([{**times, **waits}])


def _outcome(folder: Path) -> pd.DataFrame:
    """One row: the numbers of a run that published ones are compared with, of traces, bursts and multicasts alike."""
    summary, burst = _summary(folder), _scale_out(folder)
    waits = pd.read_parquet(folder / "requests.parquet", columns=["first_token_s"])
    last = pd.DataFrame({"first_token_s": [waits.first_token_s.max()]})
    return pd.concat([summary[["ttft_p90_s", "gpu_seconds"]], last, burst[["all_nodes_s"]]], axis=1)


def _arrivals(folder: Path) -> pd.DataFrame:
    """Number of requests in adjacent windows of 10 s."""
    arrival_s = pd.read_parquet(folder / "requests.parquet").arrival_s.to_numpy()
    counts = np.bincount((arrival_s / _WINDOW_S).astype(int))
    return pd.DataFrame({"at_s": np.arange(len(counts)) * _WINDOW_S, "requests": counts})


_WINDOW_S = 10.0


def _host_cache(folder: Path) -> pd.DataFrame:
    """One row: loads by tier, and lifetimes of host copies in seconds."""
    events = pd.read_parquet(folder / "events.parquet")
    config = OmegaConf.load(folder / "config.yaml")
    keep_alive_s, lasting = (OmegaConf.select(config, f"system.memory.{key}") for key in ("keep_alive_s", "lasting_nodes"))
    copies = host_copies(events, keep_alive_s, lasting_nodes=lasting or 0)
    lives = copies.end_s - copies.begin_s
    row = loads_by_tier(events) | {
        "copies": len(copies),
        "lifetime_p50_s": lives.median(),
        "lifetime_p95_s": lives.quantile(0.95),
    }
    return pd.DataFrame([{**row, "lives_within_15s": float((lives <= 15.0 + 1e-6).mean()) if len(lives) else None}])


ROWS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "requests": _requests,
    "gpus": _gpus,
    "summary": _summary,
    "parts": _parts,
    "measures": _measures,
    "scale_out": _scale_out,
    "outcome": _outcome,
    "arrivals": _arrivals,
    "host_cache": _host_cache,
}
