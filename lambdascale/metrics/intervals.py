"""Intervals of 95 % for the difference between two systems, from runs of the same requests.

*Paired*: whatever is resampled is resampled for both systems, so that what they share (a long burst, an hour of silence) cancels.

One trace: a block bootstrap. Requests of one burst wait for each other, so they are no independent samples; blocks are whole
stretches of the run that begin when both systems are idle, and last at least ``memory_s``. An idle system restarts from the same
state but for what it keeps: copies in host memory, for 15 s by default, or for as long as they or processes are kept in the runs
compared, which is therefore the shortest block. A run without idle moments (overload) is one block and has no interval.

Several traces (a generator's seeds): each is an independent sample; Student's t over the logarithms of the runs' ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lambdascale.core import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Keep-alive of host copies (reference, section 1): by default the longest time for which an idle system is not like a fresh one.
MEMORY_S = 15.0
#: With fewer blocks or seeds a percentile of the bootstrap, or t, says little; no interval is given.
FEWEST = 5
_REPLICATES = 2000
_TAIL = 0.025
# Weights held at once: replicates x requests.
_CHUNK = 4_000_000


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """Rows of one run: ``requests`` (request_id, arrival_s, ttft_s, finished_s) and ``gpus`` (at_s, delta) up to ``end_s``."""

    requests: pd.DataFrame
    gpus: pd.DataFrame
    end_s: float

    def gpu_seconds_until(self, times_s: Floats) -> Floats:
        """GPU-seconds used from the beginning until each of ``times_s``, at most until the end of the run."""
        at_s, delta = self.gpus.at_s.to_numpy(float), self.gpus.delta.to_numpy(float)
        until_s = np.minimum(times_s, self.end_s)
        return np.array([float(delta @ np.maximum(until - at_s, 0.0)) for until in until_s])


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its interval of 95 %: ``low`` and ``high`` are NaN without one, and ``method`` says why."""

    value: float
    low: float = math.nan
    high: float = math.nan
    method: str

    @property
    def known(self) -> bool:
        """True if the interval is known."""
        return not math.isnan(self.low)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Comparison of a system with the reference: ratios theirs / reference of P90 TTFT, of the longest TTFT and of GPU-seconds.

    ``blocks`` and ``traces``: how many of each were resampled; ``requests`` of one system in all runs.
    """

    p90: Interval
    longest: Interval
    gpu: Interval
    blocks: int
    traces: int
    requests: int


def blocks_of(arrival_s: Floats, finished_s: Sequence[Floats], memory_s: float = MEMORY_S) -> Ints:
    """Number of each request's block, from 0; requests in the order of their arrival.

    A block begins with a request that arrives when all earlier ones have finished in every run of ``finished_s`` (NaN: never
    finished, does not count), at least ``memory_s`` after the first arrival of the block before.
    """
    if not len(arrival_s):
        return np.empty(0, dtype=np.int64)
    latest = np.max([np.fmax.accumulate(np.nan_to_num(run, nan=-np.inf)) for run in finished_s], axis=0)
    idle = np.append(True, arrival_s[1:] > latest[:-1])
    found, current, begin_s = np.empty(len(arrival_s), dtype=np.int64), -1, -math.inf
    for index, (at_s, free) in enumerate(zip(arrival_s.tolist(), idle.tolist(), strict=True)):
        if free and at_s - begin_s >= memory_s:
            current, begin_s = current + 1, at_s
        found[index] = current
    return found


def paired(
    pairs: Sequence[tuple[RunRows, RunRows]], *, memory_s: float = MEMORY_S, seed: int = 0, independent: bool = False
) -> Paired:
    """Compare runs (reference, theirs) pair by pair; UserError unless the two runs of each pair have the same requests.

    Values are medians over the pairs. Pairs with the same arrivals (only something else is drawn, such as set-ups) share their
    blocks. ``independent``: resample the two systems each for itself, to see what pairing is worth.
    """
    if not pairs:
        raise UserError("nothing to compare: no pair of runs")
    pairs = [(_in_order(ours), _in_order(theirs)) for ours, theirs in pairs]
    for ours, theirs in pairs:
        _check_same(ours.requests, theirs.requests)
    arrivals = {ours.requests.arrival_s.to_numpy(float).tobytes() for ours, _ in pairs}
    requests = len(pairs[0][0].requests)
    if requests == 0:
        nothing = Interval(value=math.nan, method="no requests")
        return Paired(p90=nothing, longest=nothing, gpu=nothing, blocks=0, traces=len(arrivals), requests=0)
    values = np.array([_ratios(ours, theirs) for ours, theirs in pairs])
    if len(arrivals) > 1:
        p90, longest, gpu = (_over_traces(column) for column in values.T)
        return Paired(p90=p90, longest=longest, gpu=gpu, blocks=0, traces=len(arrivals), requests=len(pairs) * requests)
    p90, gpu, blocks = _over_blocks(pairs, np.median(values, axis=0), memory_s, np.random.default_rng(seed), independent)
    longest = Interval(value=float(np.median(values[:, 1])), method="a longest time cannot be resampled; several seeds can")
    return Paired(p90=p90, longest=longest, gpu=gpu, blocks=blocks, traces=1, requests=len(pairs) * requests)


def over_draws(ratios: Sequence[float]) -> Interval:
    """Interval of the typical ratio of independent draws (seeds): Student's t over logarithms; exact if all are equal."""
    return _over_traces(np.asarray(ratios, dtype=float))


def _in_order(run: RunRows) -> RunRows:
    return RunRows(requests=run.requests.sort_values("request_id", ignore_index=True), gpus=run.gpus, end_s=run.end_s)


def _check_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    columns = ["request_id", "arrival_s"]
    if len(ours) != len(theirs) or not np.array_equal(ours[columns].to_numpy(), theirs[columns].to_numpy()):
        raise UserError(f"the two runs have different requests ({len(ours)} and {len(theirs)}): they are no pair")


def _ratios(ours: RunRows, theirs: RunRows) -> tuple[float, float, float]:
    """Theirs over ours: P90 TTFT, longest TTFT, GPU-seconds; NaN if one of them has no answered request."""
    waits = [run.requests.ttft_s.dropna().to_numpy(float) for run in (ours, theirs)]
    used = [float(run.gpu_seconds_until(np.array([np.inf]))[0]) for run in (ours, theirs)]
    if not all(len(wait) for wait in waits):
        return math.nan, math.nan, math.nan
    p90 = [float(np.percentile(wait, 90)) for wait in waits]
    return p90[1] / p90[0], float(waits[1].max() / waits[0].max()), used[1] / used[0] if used[0] else math.nan


def _over_traces(ratios: Floats) -> Interval:
    value, count = float(np.median(ratios)), len(ratios)
    logs = np.log(ratios)
    if np.isnan(logs).any():
        return Interval(value=value, method="a run without answers")
    if count > 1 and np.ptp(logs) == 0:
        return Interval(value=value, low=value, high=value, method=f"{count} seeds, all equal")
    if count < FEWEST:
        return Interval(value=value, method=f"{count} seed{'s' * (count > 1)}: too few")
    half = _student(count - 1) * float(logs.std(ddof=1)) / math.sqrt(count)
    middle = float(logs.mean())
    return Interval(value=value, low=math.exp(middle - half), high=math.exp(middle + half), method=f"{count} seeds, t")


def _student(degrees: int) -> float:
    """Upper 2.5 % point of Student's t: the normal one, corrected as by Cornish and Fisher (within 0.01 from 4 degrees on)."""
    z = NormalDist().inv_cdf(1 - _TAIL)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _over_blocks(
    pairs: Sequence[tuple[RunRows, RunRows]], values: Floats, memory_s: float, rng: np.random.Generator, independent: bool
) -> tuple[Interval, Interval, int]:
    """Intervals of P90 TTFT and GPU time, and the number of blocks."""
    arrival_s = pairs[0][0].requests.arrival_s.to_numpy(float)
    blocks = blocks_of(arrival_s, [run.requests.finished_s.to_numpy(float) for pair in pairs for run in pair], memory_s)
    count = int(blocks[-1]) + 1
    p90, gpu = float(values[0]), float(values[2])
    if count < FEWEST:
        why = f"{count} block{'s' * (count > 1)}: too few"
        return Interval(value=p90, method=why), Interval(value=gpu, method=why), count
    if math.isnan(p90):
        why = "a run without answers"
        return Interval(value=p90, method=why), Interval(value=gpu, method=why), count
    picks = rng.multinomial(count, np.full(count, 1 / count), size=(2, _REPLICATES))
    ours, theirs = picks[0], picks[1] if independent else picks[0]
    waits = [_p90s(runs, blocks, weights) for runs, weights in zip(zip(*pairs, strict=True), (ours, theirs), strict=True)]
    edges_s = np.append(arrival_s[np.searchsorted(blocks, np.arange(count))], np.inf)
    edges_s[0] = 0.0
    used = [_used(runs, edges_s, weights) for runs, weights in zip(zip(*pairs, strict=True), (ours, theirs), strict=True)]
    method = f"{count} blocks"
    return _percentiles(p90, waits, method), _percentiles(gpu, used, method), count


def _percentiles(value: float, samples: Sequence[Floats], method: str) -> Interval:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = samples[1] / samples[0]
    ratios = ratios[np.isfinite(ratios)]
    if math.isnan(value) or not len(ratios):
        return Interval(value=value, method="nothing to divide by")
    low, high = (float(v) for v in np.quantile(ratios, [_TAIL, 1 - _TAIL]))
    return Interval(value=value, low=low, high=high, method=method)


def _p90s(runs: Sequence[RunRows], blocks: Ints, weights: Ints) -> Floats:
    """P90 TTFT of all runs together for every row of ``weights`` (replicates x blocks)."""
    waits = np.concatenate([run.requests.ttft_s.to_numpy(float) for run in runs])
    owners = np.tile(blocks, len(runs))[~np.isnan(waits)]
    waits = waits[~np.isnan(waits)]
    order = np.argsort(waits, kind="stable")
    step = max(1, _CHUNK // len(waits))
    parts = [
        weighted_quantile(waits[order], weights[at : at + step][:, owners[order]], 0.9) for at in range(0, len(weights), step)
    ]
    return np.concatenate(parts)


def _used(runs: Sequence[RunRows], edges_s: Floats, weights: Ints) -> Floats:
    """GPU-seconds of all runs together for every row of ``weights`` (replicates x blocks)."""
    per_block: Floats = np.sum([np.diff(run.gpu_seconds_until(edges_s)) for run in runs], axis=0)
    return np.asarray(weights @ per_block, dtype=float)


def weighted_quantile(ascending: Floats, weights: Ints, quantile: float) -> Floats:
    """Quantile of ``ascending`` values repeated ``weights`` times, one per row of weights, interpolated as numpy does.

    NaN for a row of zeros.
    """
    ends = np.cumsum(weights, axis=1)
    totals = ends[:, -1]
    places = np.maximum(totals - 1, 0) * quantile
    lower, share = np.floor(places), places - np.floor(places)
    last = len(ascending) - 1
    found = [
        ascending[np.minimum((ends <= np.minimum(rank, totals - 1)[:, None]).sum(axis=1), last)] for rank in (lower, lower + 1)
    ]
    values: Floats = np.where(totals > 0, found[0] + share * (found[1] - found[0]), np.nan)
    return values
