"""Curves of ramp-up figures: requests in service and tokens per second, from rows of requests. Frames in, arrays out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def typical_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the seed whose last first token has the median time of all seeds (the earlier of two middle ones)."""
    last = rows.groupby("seed").first_token_s.max().sort_values(kind="stable")
    typical: pd.DataFrame = rows[rows.seed == last.index[(len(last) - 1) // 2]]
    return typical


def served(rows: pd.DataFrame) -> tuple[Floats, Floats]:
    """Steps of the served share: (times in seconds, share of requests with a first token by that time)."""
    times = np.sort(rows.first_token_s.to_numpy())
    return times, np.arange(1, len(times) + 1) / len(times)


def token_rate(rows: pd.DataFrame, grid: Floats) -> Floats:
    """Tokens per second between the points of ``grid`` (s), a request's tokens spread evenly from its first to its last."""
    first, last, tokens = (rows[name].to_numpy(dtype=float) for name in ("first_token_s", "finished_s", "output_tokens"))
    rate = np.where(last > first, tokens / np.maximum(last - first, 1e-12), 0.0)
    overlap = np.clip(np.minimum(grid[1:, None], last) - np.maximum(grid[:-1, None], first), 0.0, None)
    produced: Floats = (overlap * rate).sum(axis=1) / np.diff(grid)
    return produced
