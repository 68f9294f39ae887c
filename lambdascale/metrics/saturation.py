"""Verdict on a load: does the cluster keep up with it? Defined on the second half of the time of arrivals, when it has scaled.

- OVERLOADED: of the requests that arrive, more than a tenth add to those that are open (least-squares slope of the number of open
  requests, over the rate of arrivals), or more than one in a hundred fails. The longer the load lasts, the longer they wait.
- BACKLOGGED: the number of open requests grows more slowly, but half of the requests wait longer for a place than their answer
  then takes.
- STABLE: neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from lambdascale.core import UserError

Verdict = Literal["STABLE", "BACKLOGGED", "OVERLOADED"]
_GROWTH_AT_MOST = 0.1
_FAILED_AT_MOST = 0.01
# Fewer requests tell growth from chance too badly: the number of open ones varies by about its square root.
LEAST_REQUESTS = 100


@dataclass(frozen=True)
class Saturation:
    """A verdict and its reasons. ``growth``: share of arriving requests that add to the open ones, at the end of the load.

    ``wait_share``: the median wait for a place over the median time from there to the end, None if nothing ended.
    """

    verdict: Verdict
    growth: float
    wait_share: float | None


def saturation(requests: pd.DataFrame) -> Saturation:
    """Judge the rows of requests.parquet. UserError for fewer than ``LEAST_REQUESTS``, or if all arrive at once."""
    if len(requests) < LEAST_REQUESTS:
        raise UserError(
            f"{len(requests)} requests are too few for a verdict, which needs {LEAST_REQUESTS}: let the load last longer"
        )
    begin_s, end_s = float(requests.arrival_s.min()), float(requests.arrival_s.max())
    if end_s <= begin_s:
        raise UserError("all requests arrive at once: a burst has no rate that could be kept up with")
    late = requests[requests.arrival_s >= (begin_s + end_s) / 2]
    growth = _growth(requests, (begin_s + end_s) / 2, end_s)
    failed = float((requests.status == "failed").mean())
    ended = late[late.status == "ok"]
    waited_s = ended.dispatched_s - ended.arrival_s
    served_s = float((ended.e2e_s - waited_s).median()) if len(ended) else 0.0
    wait_share = float(waited_s.median()) / served_s if served_s else None
    return Saturation(_verdict(growth, wait_share, failed), growth, wait_share)


def _verdict(growth: float, wait_share: float | None, failed: float) -> Verdict:
    if growth > _GROWTH_AT_MOST or failed > _FAILED_AT_MOST:
        return "OVERLOADED"
    return "BACKLOGGED" if wait_share is None or wait_share > 1 else "STABLE"


def _growth(requests: pd.DataFrame, begin_s: float, end_s: float) -> float:
    """Slope of the number of open requests from ``begin_s`` to ``end_s``, over the rate of arrivals there.

    A failed request leaves when it arrives: failures count for themselves.
    """
    at = np.linspace(begin_s, end_s, 200)
    arrived = np.sort(requests.arrival_s.to_numpy())
    ended = np.sort(requests.finished_s.fillna(requests.arrival_s).to_numpy())
    count = np.searchsorted(arrived, at, side="right") - np.searchsorted(ended, at, side="right")
    rate = float(((arrived >= begin_s) & (arrived <= end_s)).sum()) / (end_s - begin_s)
    return float(np.polyfit(at - begin_s, count, 1)[0]) / rate
