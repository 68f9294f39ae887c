"""What ramp-up figures share: requests in service and tokens per second, from rows of requests. Frames in, arrays out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def typical_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the seed whose last first token comes at the median of all seeds (the lower one of two)."""
    last = rows.groupby("seed").first_token_s.max().sort_values(kind="stable")
    typical: pd.DataFrame = rows[rows.seed == last.index[(len(last) - 1) // 2]]
    return typical


def served(rows: pd.DataFrame) -> tuple[Floats, Floats]:
    """(times, share of requests with a first token by then), as steps."""
    times = np.sort(rows.first_token_s.to_numpy())
    return times, np.arange(1, len(times) + 1) / len(times)


def token_rate(rows: pd.DataFrame, grid: Floats) -> Floats:
    """Tokens per second between the points of ``grid``: a request's tokens lie evenly between its first and its last."""
    first, last, tokens = (rows[name].to_numpy(dtype=float) for name in ("first_token_s", "finished_s", "output_tokens"))
    rate = np.where(last > first, tokens / np.maximum(last - first, 1e-12), 0.0)
    overlap = np.clip(np.minimum(grid[1:, None], last) - np.maximum(grid[:-1, None], first), 0.0, None)
    produced: Floats = (overlap * rate).sum(axis=1) / np.diff(grid)
    return produced
