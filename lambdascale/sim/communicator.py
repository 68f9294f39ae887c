"""Time to build a NCCL communicator: a distribution fitted to the reference's measurements (section 4, [log]).

0.4 to 2 s for 2 to 4 ranks and 0.7 to 4.4 s for 8 are read as the 5th and 95th percentiles of log-normal distributions.
Between, the logarithm of the median and the spread are linear in log2(ranks); beyond 8 ranks the median's trend goes on and
the spread stays.
"""

from __future__ import annotations

from math import exp, log, log2, sqrt

import numpy as np

_Z95 = 1.6448536269514722  # the standard normal's 95th percentile
_FEW_RANKS, _FEW_S = 4, (0.4, 2.0)
_MANY_RANKS, _MANY_S = 8, (0.7, 4.4)
_OUTLIER_S = (18.0, 120.0)


def _fit(low_high: tuple[float, float]) -> tuple[float, float]:
    low, high = low_high
    return log(sqrt(low * high)), log(high / low) / (2 * _Z95)


def setup_distribution(ranks: int) -> tuple[float, float]:
    """Return (mu, sigma) of the log-normal set-up time in seconds for ``ranks`` ranks."""
    (mu_few, sigma_few), (mu_many, sigma_many) = _fit(_FEW_S), _fit(_MANY_S)
    position = max(0.0, log2(ranks / _FEW_RANKS) / log2(_MANY_RANKS / _FEW_RANKS))
    return mu_few + position * (mu_many - mu_few), sigma_few + min(position, 1.0) * (sigma_many - sigma_few)


def draw_setup_s(ranks: int, rng: np.random.Generator, outlier_probability: float = 0.0) -> float:
    """Draw a set-up time in seconds; outliers are log-uniform over the 18 to 120 s that were seen, however rarely."""
    if outlier_probability and rng.random() < outlier_probability:
        return exp(rng.uniform(log(_OUTLIER_S[0]), log(_OUTLIER_S[1])))
    mu, sigma = setup_distribution(ranks)
    return float(rng.lognormal(mu, sigma))
