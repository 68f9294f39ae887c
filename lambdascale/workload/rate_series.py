"""Arrivals that follow a recorded rate: an inhomogeneous Gamma renewal process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lambdascale.core import TraceError, UserError
from lambdascale.workload.base import Provenance
from lambdascale.workload.columns import Columns, Floats, Streams
from lambdascale.workload.decoders import TimesDecoder
from lambdascale.workload.generators import GeneratedWorkload
from lambdascale.workload.processes import gamma_renewal
from lambdascale.workload.scan import opened, scan
from lambdascale.workload.shaping import check_count


@dataclass(frozen=True, kw_only=True)
class RateSeriesWorkload(GeneratedWorkload):
    """Requests that follow the rates in a file: one rate (requests/s) per line, each for ``bin_s``; ``#`` starts a comment.

    A Gamma renewal process of mean 1 runs in rescaled time, the integral of the rate, so that every bin gets its rate times
    ``bin_s`` requests on average and gaps have CV ``gap_shape ** -0.5`` once rescaled. The default shape is the one fitted
    to the λScale authors' 30-minute trace; 1 is Poisson. ``start_s`` and ``duration_s`` (None: to the end) choose a window
    of the series.
    """

    path: str | None = None
    bin_s: float = 60.0
    gap_shape: float = 0.304
    start_s: float = 0.0
    duration_s: float | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.path:
            raise UserError("RateSeriesWorkload needs a file of rates: set workload.path=FILE")
        self._within("bin_s", low=0.0, strict=True)
        self._within("gap_shape", low=0.01)
        self._within("start_s", low=0.0)
        self._within("duration_s", low=0.0)

    def _produce(self, streams: Streams, most: float, models: int) -> tuple[Columns, Provenance]:
        rates, digest = self._rates()
        edges_s, rates = self._windowed(rates)
        check_count(float((rates * np.diff(edges_s)).sum()), most)
        arrival_s = follow_rate(edges_s, rates, self.gap_shape, streams.arrivals)
        provenance = Provenance(source=self.path, sha256=digest, rows=len(rates))
        return self._generated(arrival_s, float(edges_s[-1]), streams), provenance

    def _rates(self) -> tuple[Floats, str]:
        assert self.path is not None, "checked on construction"
        tables: list[pa.Table] = []
        with opened(self.path) as file:
            notes = scan(file, TimesDecoder(self.path, "a rate", hint=""), tables.append, skip=False)
        if not notes.seen:
            raise TraceError(f"{self.path}: the rate series has no rows")
        return pa.concat_tables(tables)["time"].to_numpy(), notes.sha256

    def _windowed(self, rates: Floats) -> tuple[Floats, Floats]:
        """Edges of the bins, clipped to the window, in seconds from its start, and their rates."""
        end_s = len(rates) * self.bin_s
        start_s = min(self.start_s, end_s)
        stop_s = end_s if self.duration_s is None else min(start_s + self.duration_s, end_s)
        edges_s = np.clip(np.arange(len(rates) + 1) * self.bin_s, start_s, stop_s) - start_s
        return edges_s, rates


def follow_rate(edges_s: Floats, rates: Floats, gap_shape: float, rng: np.random.Generator) -> Floats:
    """Arrival times (s) of a Gamma renewal process with rate ``rates[i]`` (1/s) from ``edges_s[i]`` to ``edges_s[i + 1]``."""
    expected = np.concatenate([[0.0], np.cumsum(rates * np.diff(edges_s))])
    if expected[-1] == 0:
        return np.empty(0)
    events = gamma_renewal(float(expected[-1]), gap_shape, rng)
    # The last edge not beyond the event: of several edges with the same integral (rate 0) only the last has a rate after it.
    bins = np.searchsorted(expected, events, side="right") - 1
    arrival_s: Floats = edges_s[bins] + (events - expected[bins]) / rates[bins]
    return arrival_s
