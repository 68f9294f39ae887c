"""Published numbers, and where ours stand beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lambdascale.experiments.paper_causes import Cause

# Differences that need no explanation.
_SMALL, _SMALL_POINTS = 0.05, 2.0
#: Values of a table's rows, one per seed; from the study's own table or from that of the explanations.
Values = Callable[[pd.DataFrame], pd.Series]
#: Ends of the interval of a paired ratio, from a table's rows.
Bounds = Callable[[pd.DataFrame], tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published number: a value, or a range ``low`` to ``high``; with ``points``, errors are in percentage points."""

    figure: str
    what: str
    low: float
    high: float
    unit: str = ""
    points: bool = False

    @property
    def text(self) -> str:
        """The published number as people write it."""
        return (
            f"{self.low:g}"
            if self.low == self.high
            else f">{self.low:g}"
            if np.isinf(self.high)
            else f"{self.low:g} to {self.high:g}"
        )

    def error(self, ours: float) -> tuple[str, float]:
        """Distance of ours from the published value or range, as text, and in units of a difference that needs no explanation."""
        nearest = min(max(ours, self.low), self.high)
        if nearest == ours and self.low != self.high:
            return "inside", 0.0
        if self.points:
            return f"{ours - nearest:+.1f} points", abs(ours - nearest) / _SMALL_POINTS
        return f"{100 * (ours / nearest - 1):+.0f} %", abs(ours / nearest - 1) / _SMALL


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the comparison: a claim, where and how our value is read, its interval if known, and causes of a difference.

    ``values`` also reads the rows of the runs without a cause; ``bounds`` reads the interval of a paired ratio from them (None:
    from the seeds). An agreement is tested by the first cause only, since the others are not departures of ours. ``interval``:
    (low, high), NaN without one; None: from the seeds; ``interval_of`` says of what, if it is not of the same runs. ``setup``:
    basis of the largest communicator's set-up in our value, if that is not measured.
    """

    claim: Claim
    model: str
    values: Values
    causes: Sequence[Cause] = ()
    interval: tuple[float, float] | None = None
    interval_of: str = ""
    setup: str = ""
    bounds: Bounds | None = None


@dataclass(frozen=True, kw_only=True)
class Tried:
    """Our value in the runs without a cause, as text, with its interval of 95 % and what is left of the difference.

    ``distance``: the same in units of a difference that needs no explanation. ``bound``: see Cause.
    """

    value: str
    interval: str
    left: str
    distance: float
    bound: bool = False
