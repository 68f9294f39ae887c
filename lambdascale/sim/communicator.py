"""Time to build a NCCL communicator: log-normal, fitted to the reference's measurements (sections 4 and 7, [log]).

0.4 to 2 s for 2 to 4 ranks and 0.7 to 4.4 s for 8 are read as the 5th and 95th percentiles of log-normal distributions, and
each counts as its two known values. For 12 ranks one sample is known, 0.89 s. The logarithm of the median is
the line in log2(ranks) that fits the three best by weighted least squares, flat below 4 ranks. The spread goes from that of
4 ranks to that of 8 and stays. Medians: 0.99, 1.23 and 1.39 s for 4, 8 and 12 ranks. Beyond 12 ranks the line is extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log2
from typing import Literal, NamedTuple

import numpy as np

Basis = Literal["measured", "one sample", "extrapolated"]

_Z95 = 1.6448536269514722  # the standard normal's 95th percentile
_FEW_RANKS, _MANY_RANKS, _MOST_RANKS = 4, 8, 12
_OUTLIER_S = (18.0, 120.0)


class _Measured(NamedTuple):
    """Set-ups of ``ranks`` ranks: the smallest and largest of them, in seconds, from ``values`` known values."""

    ranks: int
    low_s: float
    high_s: float
    values: int

    @property
    def x(self) -> float:
        return log2(self.ranks / _FEW_RANKS)

    @property
    def mu(self) -> float:
        return (log(self.low_s) + log(self.high_s)) / 2


_FEW = _Measured(_FEW_RANKS, 0.4, 2.0, 2)
_MANY = _Measured(_MANY_RANKS, 0.7, 4.4, 2)
_MOST = _Measured(_MOST_RANKS, 0.89, 0.89, 1)


def _sigma(measured: _Measured) -> float:
    return log(measured.high_s / measured.low_s) / (2 * _Z95)


def _line(points: Sequence[tuple[_Measured, float]]) -> tuple[float, float]:
    """Intercept and slope of the median's logarithm over log2(ranks / 4), by least squares; ``points`` with their sigmas."""
    weights = [measured.values / sigma**2 for measured, sigma in points]
    total = sum(weights)
    mean_x = sum(w * m.x for w, (m, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * m.mu for w, (m, _) in zip(weights, points, strict=True)) / total
    across = sum(w * (m.x - mean_x) * (m.mu - mean_y) for w, (m, _) in zip(weights, points, strict=True))
    slope = across / sum(w * (m.x - mean_x) ** 2 for w, (m, _) in zip(weights, points, strict=True))
    return mean_y - slope * mean_x, slope


_INTERCEPT, _SLOPE = _line([(_FEW, _sigma(_FEW)), (_MANY, _sigma(_MANY)), (_MOST, _sigma(_MANY))])


def setup_distribution(ranks: int) -> tuple[float, float]:
    """Return (mu, sigma) of the log-normal set-up time in seconds for ``ranks`` ranks."""
    position = max(0.0, log2(ranks / _FEW_RANKS))
    return _INTERCEPT + position * _SLOPE, _sigma(_FEW) + min(position, 1.0) * (_sigma(_MANY) - _sigma(_FEW))


def setup_basis(ranks: int) -> Basis:
    """Name what the distribution for ``ranks`` ranks rests on: several measurements, a single one (9 to 12), or none (beyond)."""
    if ranks <= _MANY_RANKS:
        return "measured"
    return "one sample" if ranks <= _MOST_RANKS else "extrapolated"


def draw_setup_s(ranks: int, rng: np.random.Generator, outlier_probability: float = 0.0) -> float:
    """Draw a set-up time in seconds; outliers are log-uniform over the 18 to 120 s that were seen, however rarely."""
    if outlier_probability and rng.random() < outlier_probability:
        return exp(rng.uniform(log(_OUTLIER_S[0]), log(_OUTLIER_S[1])))
    mu, sigma = setup_distribution(ranks)
    return float(rng.lognormal(mu, sigma))
