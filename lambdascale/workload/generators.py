"""Generated workloads that need no file: a constant rate, a single burst, and the bursty cluster process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lambdascale.core.checks import require
from lambdascale.workload.base import Provenance
from lambdascale.workload.columns import Columns, Floats, Streams
from lambdascale.workload.lengths import LengthsMixin
from lambdascale.workload.processes import gamma_renewal

_CLUSTERS = 1024


@dataclass(frozen=True, kw_only=True)
class GeneratedWorkload(LengthsMixin):
    """Base of the generators: arrival times from a process, token counts from ``lengths``, models by ``popularity``."""

    popularity: Literal["first", "zipf"] = "zipf"

    def _generated(self, arrival_s: Floats, period_s: float, streams: Streams) -> Columns:
        prompt, output = self._draw_lengths(len(arrival_s), streams.lengths)
        return Columns(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, period_s=period_s)


@dataclass(frozen=True, kw_only=True)
class ConstantRate(GeneratedWorkload):
    """``rate_rps`` requests/s for ``duration_s``: a Poisson process, evenly spaced, or with Gamma gaps of ``gap_shape``.

    A Gamma shape below 1 is burstier than Poisson (CV = gap_shape ** -0.5). Even spacing starts at 0.
    """

    rate_rps: float = 1.0
    duration_s: float = 600.0
    process: Literal["poisson", "uniform", "gamma"] = "poisson"
    gap_shape: float = 0.5

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        self._within("rate_rps", low=0.0)
        self._within("duration_s", low=0.0)
        self._within("gap_shape", low=0.01)

    def _expected(self) -> float:
        return self.rate_rps * self.duration_s

    def _produce(self, streams: Streams, most: float, models: int) -> tuple[Columns, Provenance]:
        return self._generated(self._arrivals(streams.arrivals), self.duration_s, streams), Provenance()

    def _arrivals(self, rng: np.random.Generator) -> Floats:
        expected = self._expected()
        if expected == 0:
            return np.empty(0)
        if self.process == "uniform":
            return np.arange(np.ceil(expected)) / self.rate_rps
        return gamma_renewal(expected, 1.0 if self.process == "poisson" else self.gap_shape, rng) / self.rate_rps


@dataclass(frozen=True, kw_only=True)
class Burst(GeneratedWorkload):
    """``count`` requests at ``at_s``, or spread uniformly over the ``spread_s`` after it (paper, figures 8 and 9).

    With ``repeat`` a burst begins every ``period_s``, which is at least ``spread_s``; None: ``at_s`` after the end of the one
    before.
    """

    count: int = 50
    at_s: float = 0.0
    spread_s: float = 0.0
    period_s: float | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        self._within("count", low=0)
        self._within("at_s", low=0.0)
        self._within("spread_s", low=0.0)
        self._within("period_s", low=self.spread_s)

    def _expected(self) -> float:
        return self.count

    def _produce(self, streams: Streams, most: float, models: int) -> tuple[Columns, Provenance]:
        arrival_s = self.at_s + np.sort(streams.arrivals.random(self.count)) * self.spread_s
        period_s = self.at_s + self.spread_s if self.period_s is None else self.period_s
        return self._generated(arrival_s, period_s, streams), Provenance()


@dataclass(frozen=True, kw_only=True)
class BurstyWorkload(GeneratedWorkload):
    """Clusters of requests with silence between them, fitted to the λScale authors' 30-minute trace.

    A cluster is one request with probability ``single_probability``, else one request and a geometric number (at least 1,
    mean ``followers_mean``) of followers. A gap inside a cluster is, with probability ``short_gap_probability``, exponential
    with mean ``short_gap_s``, else ``gap_min_s`` plus a Gamma of ``gap_shape`` and ``gap_scale_s``. The silence from the
    end of a cluster to the next is ``silence_min_s`` plus an exponential of mean ``silence_mean_s``. The first cluster
    starts at 0, as the trace does. Unlike independent Gamma gaps, this process reproduces the trace's bursts at time scales
    of 10 to 60 s. With the same seed, a longer run begins with the arrivals of a shorter one. Token counts follow the Azure
    conversation trace, within Llama 2's context of 4,096 tokens.
    """

    duration_s: float = 1800.0
    single_probability: float = 0.507
    followers_mean: float = 5.52
    short_gap_probability: float = 0.264
    short_gap_s: float = 0.007
    gap_min_s: float = 0.03
    gap_shape: float = 0.93
    gap_scale_s: float = 0.695
    silence_min_s: float = 3.0
    silence_mean_s: float = 8.88
    lengths: Literal["fixed", "azure", "burstgpt"] = "azure"
    max_context_tokens: int | None = 4096

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for name in ("single_probability", "short_gap_probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"BurstyWorkload.{name} must be in [0, 1], not {value!r}")
        self._within("followers_mean", low=1.0)
        require(self.followers_mean <= _CLUSTERS, f"BurstyWorkload.followers_mean must be at most {_CLUSTERS}")
        self._within("gap_shape", low=0.01)
        for name in ("duration_s", "short_gap_s", "gap_min_s", "gap_scale_s", "silence_min_s"):
            self._within(name, low=0.0)
        self._within("silence_mean_s", low=0.0, strict=True)

    def _expected(self) -> float:
        followers = (1 - self.single_probability) * self.followers_mean
        long_gap_s = self.gap_min_s + self.gap_shape * self.gap_scale_s
        gap_s = self.short_gap_probability * self.short_gap_s + (1 - self.short_gap_probability) * long_gap_s
        clusters = self.duration_s / (self.silence_min_s + self.silence_mean_s + followers * gap_s)
        return clusters * (1 + followers)

    def _produce(self, streams: Streams, most: float, models: int) -> tuple[Columns, Provenance]:
        return self._generated(self._arrivals(streams.arrivals), self.duration_s, streams), Provenance()

    def _arrivals(self, rng: np.random.Generator) -> Floats:
        gaps = [self._gaps(rng)]
        gaps[0][0] = 0.0
        elapsed_s = gaps[0].sum()
        while elapsed_s < self.duration_s:
            gaps.append(self._gaps(rng))
            elapsed_s += gaps[-1].sum()
        arrival_s = np.cumsum(np.concatenate(gaps))
        return arrival_s[arrival_s < self.duration_s]

    def _gaps(self, rng: np.random.Generator) -> Floats:
        """Gap in seconds before each request of the next clusters; before the first request of a cluster, its silence."""
        followers = np.where(
            rng.random(_CLUSTERS) < self.single_probability, 0, rng.geometric(1 / self.followers_mean, _CLUSTERS)
        )
        sizes = 1 + followers
        count = int(sizes.sum())
        short = rng.random(count) < self.short_gap_probability
        gaps: Floats = np.where(
            short,
            rng.exponential(self.short_gap_s, count),
            self.gap_min_s + rng.gamma(self.gap_shape, self.gap_scale_s, count),
        )
        gaps[np.cumsum(sizes) - sizes] = self.silence_min_s + rng.exponential(self.silence_mean_s, _CLUSTERS)
        return gaps
