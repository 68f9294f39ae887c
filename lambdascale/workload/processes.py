"""Renewal processes from which the generators take arrival times."""

from __future__ import annotations

import numpy as np

from lambdascale.workload.columns import Floats

_BATCH = 4096


def gamma_renewal(length: float, shape: float, rng: np.random.Generator) -> Floats:
    """Event times in [0, length) of a stationary renewal process with Gamma gaps of mean 1 (CV = shape ** -0.5).

    The process is in equilibrium at 0: time 0 falls inside a gap, and the first event ends the rest of that gap. So the
    expected number of events in any interval is its length, however bursty the gaps.
    """
    first = rng.random() * rng.gamma(shape + 1, 1 / shape)
    parts = [np.array([first])]
    while parts[-1][-1] < length:
        parts.append(parts[-1][-1] + np.cumsum(rng.gamma(shape, 1 / shape, _BATCH)))
    times = np.concatenate(parts)
    return times[times < length]
