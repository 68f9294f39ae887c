"""Search for the load at which a configuration saturates: rates are doubled until it is overloaded, then halved in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from lambdascale.core import UserError
from lambdascale.experiments.compose import compose
from lambdascale.experiments.runner import run
from lambdascale.experiments.study import chosen
from lambdascale.metrics.saturation import Saturation, saturation

# Keys that set a workload's rate: the second one keeps the shape of any workload.
_RATE, _SCALE = "workload.rate_rps", "workload.rate_scale"
_DOUBLINGS = 12


@dataclass(frozen=True)
class Point:
    """A rate that was tried: the factor of the configured one, the run's folder and summary, and the verdict."""

    factor: float
    folder: Path
    summary: dict[str, Any]
    saturation: Saturation

    @property
    def overloaded(self) -> bool:
        """True if the cluster does not keep up."""
        return self.saturation.verdict == "OVERLOADED"

    def row(self) -> dict[str, Any]:
        """Row of the table; times in seconds."""
        rates = self.summary["rates"]
        return {
            "requested_per_s": rates["requested_per_s"],
            "achieved_per_s": rates["achieved_per_s"],
            "ttft_p50_s": self.summary["ttft_s"]["p50"],
            "ttft_p90_s": self.summary["ttft_s"]["p90"],
            "tpot_mean_s": self.summary["tpot_s"]["mean"],
            "growth": self.saturation.growth,
            "wait_share": self.saturation.wait_share,
            "failed": self.summary["requests"]["failed"],
            "verdict": self.saturation.verdict,
            "backend": self.summary["backend"],
        }


def search_rate(overrides: Sequence[str], refinements: int, report: Callable[[Point], None]) -> list[Point]:
    """Try rates until the highest is overloaded and the lowest is not; return the points by rate. ``report`` hears of each.

    ``refinements``: rates to try between the two at the end. UserError for a workload without a rate, or one that no rate
    overloads.
    """
    given = _with_workload(overrides)
    key, start = _rate_key(given)
    points: dict[float, Point] = {}

    def attempt(factor: float) -> Point:
        done = run(compose([*given, f"{key}={start * factor!r}"]))
        point = Point(factor, done.folder, done.summary, saturation(pd.read_parquet(done.folder / "requests.parquet")))
        points[factor] = point
        report(point)
        return point

    low, high = _bracket(attempt)
    for _ in range(refinements):
        middle = sqrt(low * high)
        low, high = (low, middle) if attempt(middle).overloaded else (middle, high)
    return [points[factor] for factor in sorted(points)]


def _bracket(attempt: Callable[[float], Point]) -> tuple[float, float]:
    """Two factors, the second twice the first, of which only the second overloads the cluster."""
    step = 0.5 if attempt(1.0).overloaded else 2.0
    factor = 1.0
    for _ in range(_DOUBLINGS):
        before, factor = factor, factor * step
        if attempt(factor).overloaded == (step > 1):
            return min(before, factor), max(before, factor)
    what = "no rate up to" if step > 1 else "every rate down to"
    raise UserError(f"{what} {factor:g} times the configured one overloads the cluster: choose another rate to begin with")


def _with_workload(overrides: Sequence[str]) -> list[str]:
    """Return settings that choose a workload: those given, or else the constant rate of experiment=sweep_rate."""
    if chosen(overrides, "experiment") is not None:
        return [*overrides]
    # The experiment's keys are those of its own workload.
    return ["experiment=sweep_rate" if chosen(overrides, "workload") is None else "name=sweep_rate", *overrides]


def _rate_key(overrides: Sequence[str]) -> tuple[str, float]:
    """Key of the workload's rate, and its value; UserError if the workload has none, or a rate of 0."""
    config = compose(overrides)
    key = _RATE if OmegaConf.select(config, _RATE) is not None else _SCALE
    value = OmegaConf.select(config, key)
    if not isinstance(value, int | float) or value <= 0:
        raise UserError(f"this workload has no {_RATE} or {_SCALE} above 0 to raise")
    return key, float(value)
