"""Rescaling, clipping and model assignment, shared by every workload.

Applied in this order, so that each setting means the same whatever else is set:

1. window (readers only): arrivals in [start_s, start_s + duration_s) of the trace, counted from start_s;
2. ``repeat``: that many copies one after the other, each shifted by the length of the one before;
3. ``rate_scale``: below 1 each request is kept with that probability (thinning). Above 1 each request is copied, the
   fractional part with that probability, and a copy follows its original after a uniform fraction of the shorter of
   the two gaps beside it (the last request: beside it and the end of the window). Bursts stay together and grow, and
   the rate keeps its shape at time scales longer than a gap;
4. ``time_compression``: every arrival time is divided by it;
5. ``limit``: only the first ``limit`` requests are kept;
6. ``max_output_tokens``, ``max_prompt_tokens``, ``max_context_tokens``: longer requests are cut, not dropped. The
   context limit shortens the prompt, and the answer only where it alone fills the context.

``max_output_tokens`` is also the limit that every request states (its ``max_tokens``), less where the prompt leaves less of
``max_context_tokens``: no public trace records the limits of its clients, only our own runs do (workload=run). Serving systems
see this limit and not where the answer ends.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import ClassVar, Literal

import numpy as np

from lambdascale.core import Request, TracedRequest, UserError
from lambdascale.core.checks import check_types, require
from lambdascale.workload.base import LoadedTrace, Provenance
from lambdascale.workload.columns import Columns, Floats, Ints, Objects, Streams

# Above the longest answer of all traces read here (7,315 tokens, BurstGPT), so that none is cut.
DEFAULT_LIMIT = 8192


@dataclass(frozen=True, kw_only=True)
class ShapedWorkload(ABC):
    """Base of all workloads: the settings listed above, and the choice of each request's model.

    ``popularity`` "first" sends everything to the first model; "zipf" draws the i-th model with weight
    i ** -zipf_exponent (0: uniform), once per session where the trace has sessions.
    """

    time_compression: float = 1.0
    rate_scale: float = 1.0
    repeat: int = 1
    limit: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = DEFAULT_LIMIT
    max_context_tokens: int | None = None
    popularity: Literal["first", "zipf"] = "first"
    zipf_exponent: float = 1.0

    records_limits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self)
        self._within("time_compression", low=0.0, strict=True)
        self._within("rate_scale", low=0.0)
        self._within("zipf_exponent", low=0.0)
        self._within("repeat", low=1)
        self._within("limit", low=0)
        self._within("max_prompt_tokens", low=1)
        self._within("max_output_tokens", low=1)
        require(
            self.max_output_tokens is not None or self.records_limits,
            f"{type(self).__name__}.max_output_tokens must be a number: this workload does not record the limits of its requests",
        )
        self._within("max_context_tokens", low=2)

    def _within(self, name: str, *, low: float, strict: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        bound = "more than" if strict else "at least"
        require(
            math.isfinite(value) and (value > low if strict else value >= low),
            f"{type(self).__name__}.{name} must be finite and {bound} {low:g}, not {value!r}",
        )

    def requests(self, *, models: Sequence[str], seed: int) -> Sequence[TracedRequest]:
        """Requests of :meth:`load`, without their provenance."""
        return self.load(models=models, seed=seed).requests

    def load(self, *, models: Sequence[str], seed: int, max_requests: float = math.inf) -> LoadedTrace:
        """Requests as :meth:`Workload.requests` describes them, with their provenance; the same errors.

        UserError, before they are made, for settings that ask for more than ``max_requests``.
        """
        names = list(models)
        require(len(names) > 0, "a workload needs at least one model name")
        require(len(set(names)) == len(names), f"model names must differ: {names}")
        streams = Streams.of(seed)
        most = max_requests / (self.repeat * max(1.0, self.rate_scale))
        check_count(self._expected(), most)
        columns, provenance = self._produce(streams, most, len(names))
        check_count(len(columns), most)
        columns = self._shaped(columns, streams.scaling)
        columns = replace(columns, limit=self._limits(columns), trace_model=self._models_of(columns, names, streams))
        failed = (columns.prompt_tokens == 0) | (columns.output_tokens == 0)
        served = _as_requests(columns.take(np.flatnonzero(~failed)), names, 0)
        unserved = _as_requests(columns.take(np.flatnonzero(failed)), names, len(served))
        return LoadedTrace(requests=served, provenance=provenance, failed=unserved)

    @abstractmethod
    def _produce(self, streams: Streams, most: float, models: int) -> tuple[Columns, Provenance]:
        """Requests for ``models`` models before rescaling, with their provenance; UserError for more than ``most``."""

    def _expected(self) -> float:
        """Number of requests before rescaling, on average; 0 where a file decides."""
        return 0.0

    def _shaped(self, columns: Columns, scaling: np.random.Generator) -> Columns:
        columns = _repeated(columns, self.repeat)
        columns = _rate_scaled(columns, self.rate_scale, scaling)
        columns = replace(columns, arrival_s=columns.arrival_s / self.time_compression)
        return self._clipped(columns.take(slice(self.limit)))

    def _clipped(self, columns: Columns) -> Columns:
        context = self.max_context_tokens
        output = np.minimum(columns.output_tokens, _least(self.max_output_tokens, None if context is None else context - 1))
        prompt = np.minimum(columns.prompt_tokens, _least(self.max_prompt_tokens))
        if context is not None:
            prompt = np.minimum(prompt, context - output)
        return replace(columns, prompt_tokens=prompt, output_tokens=output)

    def _limits(self, columns: Columns) -> Ints:
        """The limit that each request states for its answer, in tokens."""
        limits = np.full(len(columns), _least(self.max_output_tokens), dtype=np.int64)
        if columns.limit is not None:
            limits = np.minimum(limits, columns.limit)
        return limits if self.max_context_tokens is None else np.minimum(limits, self.max_context_tokens - columns.prompt_tokens)

    def _models_of(self, columns: Columns, models: list[str], streams: Streams) -> Ints:
        if columns.trace_model is not None:
            names = ", ".join(columns.trace_models)
            require(
                len(columns.trace_models) <= len(models),
                f"the trace names {len(columns.trace_models)} models ({names}), the run has {len(models)}",
            )
            return columns.trace_model
        if self.popularity == "first":
            return np.zeros(len(columns), dtype=np.int64)
        weights = np.arange(1, len(models) + 1, dtype=np.float64) ** -float(self.zipf_exponent)
        choosing = np.arange(len(columns)) if columns.session is None else _by_session(columns.session)
        chosen = streams.models.choice(len(models), size=choosing.max(initial=-1) + 1, p=weights / weights.sum())
        return np.asarray(chosen[choosing], dtype=np.int64)


def check_count(count: float, most: float) -> None:
    """Raise UserError for more requests, before rescaling, than ``most``."""
    if not count <= most:
        excess = f"about {count / most:.3g} times as many requests as max_events allows"
        raise UserError(f"the workload has {excess}: ask for fewer, or raise max_events")


def _least(*limits: int | None) -> int:
    return min((limit for limit in limits if limit is not None), default=np.iinfo(np.int64).max)


def _repeated(columns: Columns, copies: int) -> Columns:
    if copies == 1 or not len(columns):
        return columns
    if columns.period_s <= 0:
        raise UserError(f"repeat={copies} needs a workload that lasts longer than 0 s")
    rows = np.tile(np.arange(len(columns)), copies)
    shift = np.repeat(np.arange(copies), len(columns)) * columns.period_s
    repeated = columns.take(rows)
    return replace(repeated, arrival_s=repeated.arrival_s + shift, period_s=columns.period_s * copies)


def _rate_scaled(columns: Columns, scale: float, rng: np.random.Generator) -> Columns:
    if scale == 1 or not len(columns):
        return columns
    whole = math.floor(scale)
    copies = whole + (rng.random(len(columns)) < scale - whole)
    original = np.repeat(np.arange(len(columns)), copies)
    is_original = np.diff(original, prepend=-1) != 0
    gap_s = np.diff(columns.arrival_s)
    left_s = max(columns.period_s - float(columns.arrival_s[-1]), 0.0)
    room_s = np.minimum(np.append(gap_s, left_s), np.insert(gap_s, 0, np.inf)) if len(gap_s) else np.zeros(1)
    delay_s: Floats = np.where(is_original, 0.0, rng.random(len(original)) * room_s[original])
    return columns.take(original).at(columns.arrival_s[original] + delay_s)


def _by_session(sessions: Objects) -> Ints:
    """Number of the session of each request; a request without one has a number of its own."""
    numbers = np.unique(sessions.astype(str), return_inverse=True)[1]
    alone = np.flatnonzero(sessions == "")
    numbers[alone] = len(sessions) + np.arange(len(alone))
    return np.asarray(np.unique(numbers, return_inverse=True)[1], dtype=np.int64)


def _as_requests(columns: Columns, names: list[str], first_id: int) -> tuple[TracedRequest, ...]:
    assert columns.trace_model is not None, "models are chosen before"
    assert columns.limit is not None, "limits are stated before"
    named = [names[index] for index in columns.trace_model.tolist()]
    ids = range(first_id, first_id + len(columns))
    rows = zip(ids, columns.arrival_s.tolist(), named, columns.prompt_tokens.tolist(), columns.limit.tolist(), strict=True)
    sessions = repeat(None) if columns.session is None else [name or None for name in columns.session.tolist()]
    outputs = zip(columns.output_tokens.tolist(), sessions, strict=False)
    return tuple(TracedRequest(Request(*row), *end) for row, end in zip(rows, outputs, strict=True))
