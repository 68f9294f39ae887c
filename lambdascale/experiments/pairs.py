"""Tables of pairs: each system's runs beside the reference system's runs of the same requests, with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from lambdascale.core import UserError
from lambdascale.experiments.folder import SUMMARY, read_json
from lambdascale.experiments.setups import setup_text
from lambdascale.experiments.study import Study
from lambdascale.metrics.intervals import MEMORY_S, Interval, RunRows, paired

_REQUESTS = ["request_id", "arrival_s", "ttft_s", "finished_s"]
# How long an idle system keeps replicas, copies in host memory and processes.
_KEEP_ALIVES = ("system.autoscaler.keep_alive_s", "system.memory.keep_alive_s", "backend.pool.keep_alive_s")
#: Measures of a pair: columns ``NAME_ratio`` (theirs over the reference's), ``NAME_low`` and ``NAME_high`` (95 %), ``NAME_by``.
MEASURES = ("p90", "longest", "gpu")


def pair_table(study: Study, folders: Sequence[Path]) -> pd.DataFrame:
    """One row per system other than its reference and combination of the study's columns: ratios with intervals of 95 %.

    A system's reference is named in ``study.references``, else it is ``study.reference``. Ratios are theirs over the
    reference's. Runs are paired by seed; a reference with one run is paired with all. UserError if a system has runs and its
    reference none, or none of that seed.
    """
    runs: dict[tuple[Any, ...], dict[str, dict[int, Path]]] = defaultdict(lambda: defaultdict(dict))
    for folder in folders:
        config = OmegaConf.load(folder / "config.yaml")
        assert isinstance(config, DictConfig), "a run's configuration is a mapping"
        labels = tuple(_plain(OmegaConf.select(config, key)) for key in study.columns.values())
        runs[(*labels, str(config.model.name))][str(config.system.name)][int(config.seed)] = folder
    names = (*study.columns, "model")
    rows = [
        dict(zip(names, labels, strict=True))
        | {"system": system, "reference": reference}
        | _row(systems.get(reference, {}), theirs, f"{system}, {labels}", reference)
        for labels, systems in runs.items()
        for system, theirs in systems.items()
        for reference in [study.references.get(system, study.reference)]
        if system != reference
    ]
    return pd.DataFrame(rows, columns=[*names, "system", "reference", *_COLUMNS])


def with_intervals(table: pd.DataFrame, study: Study, folders: Sequence[Path]) -> pd.DataFrame:
    """Rows of single runs with the intervals of their system's ratios to its reference: P90 TTFT, GPU time; NaN without one."""
    keys = [*study.columns, "model", "system"]
    found = pair_table(study, folders)[[*keys, *INTERVALS]]
    return table.merge(found, on=keys, how="left")


#: Columns that rows of single runs get from pairs.
INTERVALS = ("p90_low", "p90_high", "gpu_low", "gpu_high")
_COLUMNS = [
    *("p90_s", "reference_p90_s"),
    *(f"{name}_{part}" for name in MEASURES for part in ("ratio", "low", "high", "by")),
    *("blocks", "block_s", "traces", "requests", "failed", "setup", "backend"),
]


def _plain(value: Any) -> Any:
    return str(OmegaConf.to_container(value)) if OmegaConf.is_config(value) else value


def _row(ours: Mapping[int, Path], theirs: Mapping[int, Path], what: str, reference: str) -> dict[str, Any]:
    pairs = [(_partner(ours, seed, what, reference), folder) for seed, folder in sorted(theirs.items())]
    summaries = [[read_json(folder / SUMMARY) for folder in pair] for pair in pairs]
    block_s = max(memory_s(folder) for pair in pairs for folder in pair)
    found = paired([(run_rows(own), run_rows(other)) for own, other in pairs], memory_s=block_s)
    p90 = [_median([pair[side]["ttft_s"]["p90"] for pair in summaries]) for side in (0, 1)]
    row: dict[str, Any] = {"p90_s": p90[1], "reference_p90_s": p90[0]}
    for name in MEASURES:
        row |= _cells(name, getattr(found, name))
    row |= {
        "blocks": found.blocks,
        "block_s": block_s if found.blocks else None,
        "traces": found.traces,
        "requests": found.requests,
    }
    backends = sorted({summary["backend"] for pair in summaries for summary in pair})
    row |= {"failed": sum(s["requests"]["failed"] for pair in summaries for s in pair)}
    return row | {"setup": setup_text(s for pair in summaries for s in pair), "backend": "+".join(backends)}


def _partner(ours: Mapping[int, Path], seed: int, what: str, reference: str) -> Path:
    if len(ours) == 1:
        return next(iter(ours.values()))
    if seed not in ours:
        raise UserError(f"no run of {reference} to compare with: {what}, seed {seed}")
    return ours[seed]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _cells(name: str, interval: Interval) -> dict[str, Any]:
    numbers = {"ratio": interval.value, "low": interval.low, "high": interval.high, "by": interval.method}
    return {f"{name}_{part}": value for part, value in numbers.items()}


def memory_s(folder: Path) -> float:
    """Seconds for which an idle system of a run differs from a fresh one: its longest keep-alive, at least MEMORY_S.

    What is kept for ever does not count: no block is as long, and once every node has it, an idle system is the same again.
    """
    config = OmegaConf.load(folder / "config.yaml")
    kept = [OmegaConf.select(config, key) for key in _KEEP_ALIVES]
    return max([MEMORY_S, *(float(seconds) for seconds in kept if seconds is not None)])


def run_rows(folder: Path) -> RunRows:
    """Rows of a run that pairs are made of."""
    summary = read_json(folder / SUMMARY)
    return RunRows(
        requests=pd.read_parquet(folder / "requests.parquet", columns=_REQUESTS),
        gpus=pd.read_parquet(folder / "gpus.parquet", columns=["at_s", "delta"]),
        end_s=summary["simulated_s"] if summary["simulated_s"] is not None else summary["wall_s"],
    )
