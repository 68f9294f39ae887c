"""A run as a few curves: what happened in each of equal windows of its time."""

from __future__ import annotations

import numpy as np
import pandas as pd


def over_time(requests: pd.DataFrame, gpus: pd.DataFrame, end_s: float, windows: int = 100) -> pd.DataFrame:
    """From the rows of requests.parquet and gpus.parquet, all models together, a row per window of the ``end_s`` seconds.

    ``time_s``: the window's end; ``gpus``: mean GPUs in use; ``gpu_seconds``: used so far; ``finished``: requests so far;
    ``ttft_max_s``: the worst TTFT of the requests that arrived in the window, NaN if none did or none was answered.
    """
    edges = np.linspace(0.0, max(end_s, 1e-9), windows + 1)
    held = np.maximum(edges[:, None] - gpus.at_s.to_numpy()[None, :], 0.0) @ gpus.delta.to_numpy(dtype=float)
    window = np.clip(np.searchsorted(edges, requests.arrival_s, side="right") - 1, 0, windows - 1)
    worst = requests.ttft_s.groupby(window).max().reindex(range(windows))
    finished = np.searchsorted(np.sort(requests.finished_s.dropna()), edges[1:], side="right")
    return pd.DataFrame(
        {
            "time_s": edges[1:],
            "gpus": np.diff(held) / (edges[1] - edges[0]),
            "gpu_seconds": held[1:],
            "finished": finished,
            "ttft_max_s": worst.to_numpy(),
        }
    )
