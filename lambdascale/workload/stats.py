"""Statistics of arrival times: the burstiness of a trace at several time scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lambdascale.core import UserError
from lambdascale.core.checks import require
from lambdascale.workload.columns import Floats, Ints

WINDOWS_S = (1, 10, 60)
_SPIKE_WINDOW_S = 10


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A period in which the rate over 10 s stays at or above a multiple of its median; ``peak`` is the highest multiple."""

    start_s: float
    end_s: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class TraceStats:
    """Burstiness of a trace. Dictionaries are keyed by window length in seconds.

    ``mean_rps`` is requests over the time from first to last arrival; ``gap_cv`` the standard deviation of gaps over their
    mean; ``fano`` the variance of counts per window over their mean (1 for Poisson); ``busiest`` the highest count of a
    window, ``peak_to_mean`` that count over the mean count, ``empty_share`` the share of windows without a request. Windows
    are adjacent and start at the first arrival; the last one may reach beyond the last arrival.
    """

    requests: int
    span_s: float
    mean_rps: float
    gap_cv: float
    fano: dict[int, float]
    busiest: dict[int, int]
    peak_to_mean: dict[int, float]
    empty_share: dict[int, float]


def _ascending(arrival_s: ArrayLike) -> Floats:
    times: Floats = np.sort(np.asarray(arrival_s, dtype=np.float64))
    require(times.ndim == 1 and bool(np.isfinite(times).all()), "arrival times must be a list of finite seconds")
    if len(times) < 2 or times[0] == times[-1]:
        raise UserError(f"statistics need arrivals at two or more different times, not {len(times)} arrivals at one")
    times -= times[0]
    return times


def counts_per_window(arrival_s: Floats, window_s: float) -> Ints:
    """Number of requests in each of the adjacent windows [i * window_s, (i + 1) * window_s) up to the last arrival."""
    return np.bincount((arrival_s / window_s).astype(np.int64))


def trace_stats(arrival_s: ArrayLike) -> TraceStats:
    """Statistics of arrival times in seconds, in any order; UserError unless at least two of them differ."""
    times = _ascending(arrival_s)
    gaps = np.diff(times)
    counts = {window: counts_per_window(times, window) for window in WINDOWS_S}
    return TraceStats(
        requests=len(times),
        span_s=float(times[-1]),
        mean_rps=len(times) / float(times[-1]),
        gap_cv=float(gaps.std() / gaps.mean()),
        fano={window: float(c.var() / c.mean()) for window, c in counts.items()},
        busiest={window: int(c.max()) for window, c in counts.items()},
        peak_to_mean={window: float(c.max() / c.mean()) for window, c in counts.items()},
        empty_share={window: float((c == 0).mean()) for window, c in counts.items()},
    )


def spikes(arrival_s: ArrayLike, *, factor: float) -> tuple[Spike, ...]:
    """Longest possible periods in which the count over 10 s, slid by 1 s, is at least ``factor`` times its median.

    The median is taken over all positions of the window and is at least 1 request, so that a trace that is silent most of
    the time has a finite base. ``start_s`` and ``end_s`` are the starts of the first and last such window, counted from the
    first arrival. A trace shorter than 10 s has no spikes. UserError for a factor that is not positive or as for
    :func:`trace_stats`.
    """
    require(factor > 0, f"a spike's factor must be positive, not {factor!r}")
    counts = counts_per_window(_ascending(arrival_s), 1)
    if len(counts) < _SPIKE_WINDOW_S:
        return ()
    sliding = np.convolve(counts, np.ones(_SPIKE_WINDOW_S), "valid")
    multiple = sliding / max(float(np.median(sliding)), 1.0)
    turns = np.diff(np.concatenate([[False], multiple >= factor, [False]]).astype(np.int8))
    starts, ends = np.flatnonzero(turns == 1), np.flatnonzero(turns == -1)
    return tuple(
        Spike(start_s=float(start), end_s=float(end - 1), peak=float(multiple[start:end].max()))
        for start, end in zip(starts, ends, strict=True)
    )
