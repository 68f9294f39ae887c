"""Requests as parallel columns, which readers and generators produce and rescaling changes, before they get ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lambdascale.core import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Objects = NDArray[np.object_]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Columns:
    """Parallel columns with one entry per request: ``arrival_s`` in seconds, ascending; token counts of at least 1.

    A request that the trace records as failed has a token count of 0.

    ``period_s`` is the length in seconds of the time covered, quiet ends included; a repetition is shifted by it.
    ``trace_model`` holds the position of each request's model among ``trace_models``, the trace's own names; None if
    the trace does not choose models. ``session`` names the session of each request, "" for none; ``limit`` is the most
    tokens that its answer may have, as the trace records it; None where the trace has none of these.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    period_s: float
    trace_model: Ints | None = None
    trace_models: tuple[str, ...] = ()
    session: Objects | None = None
    limit: Ints | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    def take(self, rows: Ints | slice) -> Columns:
        """Select the given rows, in the given order."""
        return replace(
            self,
            arrival_s=self.arrival_s[rows],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            trace_model=None if self.trace_model is None else self.trace_model[rows],
            session=None if self.session is None else self.session[rows],
            limit=None if self.limit is None else self.limit[rows],
        )

    def at(self, arrival_s: Floats) -> Columns:
        """Return the same requests at other times, sorted; requests at the same time keep their order."""
        order = np.argsort(arrival_s, kind="stable")
        return replace(self.take(order), arrival_s=arrival_s[order])


def natural_period_s(arrival_s: Floats) -> float:
    """Length in seconds of a trace from its first arrival to one mean gap after its last; 0 for fewer than two arrivals."""
    count = len(arrival_s)
    return float(np.ptp(arrival_s)) * count / (count - 1) if count > 1 else 0.0


@dataclass(frozen=True)
class Streams:
    """Independent random streams of one seed, so that changing one kind of choice leaves the others unchanged."""

    arrivals: np.random.Generator
    lengths: np.random.Generator
    models: np.random.Generator
    scaling: np.random.Generator

    @classmethod
    def of(cls, seed: int) -> Streams:
        """Streams of ``seed``; UserError unless it is a whole number of at least 0."""
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise UserError(f"seed must be a whole number of at least 0, not {seed!r}")
        return cls(*(np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(seed).spawn(4)))
