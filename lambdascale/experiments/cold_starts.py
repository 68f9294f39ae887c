"""Comparisons of systems when whole cold starts are counted: ratios from the table of the study cold_starts. Frames in, out."""

from __future__ import annotations

import pandas as pd

from lambdascale.core import UserError
from lambdascale.experiments.pairs import INTERVALS

_OURS = "lambdascale"
_KEYS = ["model", "pool", "kept_s"]
_MEASURES = ["ttft_p90_s", "gpu_seconds"]
_COLUMNS = ["ttft_p90_s", "p90_ratio", "p90_low", "p90_high", "gpu_seconds", "gpu_ratio", "gpu_low", "gpu_high"]


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """P90 TTFT and GPU time of each system, medians over seeds, and over λScale's, for each model and pool of processes.

    ``pool``: class of the pool; ``kept_s``: seconds for which it keeps the process of a released node. Intervals of 95 % are
    those of the table, which are alike for all seeds of a system. UserError if λScale has no runs with a pool.
    """
    frame = table.assign(pool=table.pool.str.rpartition(".")[2])
    groups = frame.groupby([*_KEYS, "system", "backend"], sort=False, dropna=False)
    found = pd.concat([groups[_MEASURES].median(), groups[list(INTERVALS)].first()], axis=1).reset_index()
    ours = found[found.system == _OURS][[*_KEYS, *_MEASURES]]
    both = found.merge(ours, on=_KEYS, how="left", suffixes=("", "_ours"))
    alone = both[both.ttft_p90_s_ours.isna()]
    if len(alone):
        raise UserError(f"cold_starts: no runs of {_OURS} for {alone.model.iloc[0]}, {alone.pool.iloc[0]}")
    both["p90_ratio"] = both.ttft_p90_s / both.ttft_p90_s_ours
    both["gpu_ratio"] = both.gpu_seconds / both.gpu_seconds_ours
    return both[[*_KEYS, "system", *_COLUMNS, "backend"]]
