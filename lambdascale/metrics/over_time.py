"""Curves of a run: measures of equal windows of its time."""

from __future__ import annotations

import numpy as np
import pandas as pd


def over_time(requests: pd.DataFrame, gpus: pd.DataFrame, end_s: float, windows: int = 100) -> pd.DataFrame:
    """One row per window of a run of ``end_s`` seconds, cut into ``windows`` equal parts; all models together.

    ``requests`` and ``gpus`` are the rows of requests.parquet and gpus.parquet. Columns: ``time_s`` is the end of the window,
    ``gpus`` the mean number of GPUs in use, ``gpu_seconds`` and ``finished`` the GPU-seconds used and requests finished so far,
    ``ttft_max_s`` the worst TTFT of the requests that arrived in the window, NaN if none arrived or none was answered.
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


def token_rates(requests: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens per second as steps: times in seconds of the run, and the rate from each of them on.

    ``requests``: rows of requests.parquet; a request's tokens are spread evenly from its first to its last.
    """
    rows = requests[requests.finished_s > requests.first_token_s]
    rates = (rows.output_tokens / (rows.finished_s - rows.first_token_s)).to_numpy(float)
    times = np.concatenate([rows.first_token_s.to_numpy(float), rows.finished_s.to_numpy(float)])
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(np.concatenate([rates, -rates])[order])


def reached_s(requests: pd.DataFrame, tokens_per_s: float) -> float:
    """Return the seconds from the first arrival until so many tokens per second were produced; NaN if they never were."""
    times, rates = token_rates(requests)
    found = times[rates >= tokens_per_s]
    return float(found[0] - requests.arrival_s.min()) if len(found) else float("nan")
