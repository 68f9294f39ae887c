"""Shared parts of the trace readers: the time window, requests without tokens, the check of units."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from lambdascale.core import TraceError, UserError
from lambdascale.workload.base import Provenance
from lambdascale.workload.columns import Columns, Floats, Streams, natural_period_s
from lambdascale.workload.decoders import TICKS_PER_S, Decoder, TimeUnit
from lambdascale.workload.index import stored
from lambdascale.workload.scan import Notes, Span, with_tokens
from lambdascale.workload.shaping import ShapedWorkload, check_count

# A trace of more requests than this that spans less than this many seconds is suspected of another unit of time.
_MANY, _SHORT_S = 100, 60.0
_UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Hashes of a block cover as many tokens as stated, within this factor on average.
_BLOCK_FACTOR = 2.0

Failures = Literal["drop", "count", "refuse"]


@dataclass(frozen=True, kw_only=True)
class WindowedWorkload(ShapedWorkload):
    """Base of the readers of requests: ``start_s`` and ``duration_s`` (None: to the end) choose a window of the trace."""

    path: str | None = None
    start_s: float = 0.0
    duration_s: float | None = None

    how_to_get: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.path:
            raise UserError(f"{type(self).__name__} needs a file: set workload.path=FILE{self.how_to_get}")
        self._within("start_s", low=0.0)
        self._within("duration_s", low=0.0)

    def _windowed(self, columns: Columns) -> Columns:
        length_s = np.inf if self.duration_s is None else self.duration_s
        times = columns.arrival_s - self.start_s
        inside = np.flatnonzero((times >= 0) & (times < length_s))
        rest_s = max(columns.period_s - self.start_s, 0.0)
        return replace(columns.take(inside), arrival_s=times[inside], period_s=min(rest_s, length_s))


@dataclass(frozen=True, kw_only=True)
class TraceFile(WindowedWorkload):
    """Base of the readers of text: a file of one request a row, sorted by time here and counted from its earliest row.

    A malformed row is a TraceError with file and line (counted from 1, header included) unless ``skip_bad_rows``, which leaves
    such rows out and counts them. A file without a usable row is a TraceError; a window without one is an empty workload.
    """

    skip_bad_rows: bool = False

    @abstractmethod
    def _decoder(self) -> Decoder:
        """A decoder of this format, for one pass."""

    def _key(self) -> str:
        """All settings of the decoder, in a text."""
        return type(self).__name__

    def _produce(self, streams: Streams, most: float, models: int) -> tuple[Columns, Provenance]:
        assert self.path is not None, "checked on construction"
        found = stored(self.path, self.how_to_get, self._decoder(), self._key(), skip=self.skip_bad_rows)
        notes, span = found.notes, self._span(found.notes)
        if notes.first_fault is not None and not self.skip_bad_rows:
            line, fault = notes.first_fault
            raise TraceError(f"{self.path}:{line}: {fault}{Decoder.hint}")
        self._check(notes)
        if not span.count:
            raise TraceError(f"{self.path}: {notes.why_empty()}")
        table = self._kept(found.between(*self._range(span)))
        check_count(table.num_rows * self._requests_per_row, most)
        provenance = Provenance(
            source=self.path,
            sha256=notes.sha256,
            rows=notes.seen,
            skipped_rows=notes.skipped,
            dropped_failures=notes.every.count - span.count,
        )
        return self._windowed(self._columns(table, notes, span, streams)), provenance

    def _check(self, notes: Notes) -> None:
        """Raise TraceError for a file that this reader does not accept."""

    def _span(self, notes: Notes) -> Span:
        return notes.every

    def _kept(self, table: pa.Table) -> pa.Table:
        return table

    def _range(self, span: Span) -> tuple[float, float]:
        """First and last tick of the window, and a second more on each side: the window itself is cut in seconds, exactly."""
        if self._moved:
            return -np.inf, np.inf
        per_s = TICKS_PER_S[self._unit]
        low = span.first + (self.start_s - 1) * per_s
        return low, np.inf if self.duration_s is None else low + (self.duration_s + 2) * per_s

    @property
    def _unit(self) -> TimeUnit:
        return "s"

    @property
    def _requests_per_row(self) -> int:
        return 1

    def _columns(self, table: pa.Table, notes: Notes, span: Span, streams: Streams) -> Columns:
        # Subtracting integer ticks keeps the 100 ns that a date stored as a double would lose.
        ticks, per_s = table["time"].to_numpy(), TICKS_PER_S[self._unit]
        times = np.asarray((ticks - ticks.dtype.type(span.first)) / per_s, dtype=np.float64)
        period_s = float((span.last - span.first) / per_s) * span.count / (span.count - 1) if span.count > 1 else 0.0
        if self._moved:
            times = self._drawn(times, table, streams)
            times, period_s = times - times.min(), natural_period_s(times)
        columns = Columns(
            arrival_s=times,
            prompt_tokens=np.asarray(table["prompt_tokens"].to_numpy(), dtype=np.int64),
            output_tokens=np.asarray(table["output_tokens"].to_numpy(), dtype=np.int64),
            period_s=period_s,
        )
        return self._labelled(columns, table, notes).at(times)

    def _labelled(self, columns: Columns, table: pa.Table, notes: Notes) -> Columns:
        """Columns with the models and sessions of the trace."""
        return columns

    @property
    def _moved(self) -> bool:
        """True if arrival times are partly drawn; then they are drawn for the whole trace before the window is cut."""
        return False

    def _drawn(self, times: Floats, table: pa.Table, streams: Streams) -> Floats:
        """Arrival times in seconds from those of the trace."""
        return times


@dataclass(frozen=True, kw_only=True)
class TokenTrace(TraceFile):
    """Base of the readers of token counts.

    ``failures``: requests without prompt or output tokens, as traces record those that failed, are left out and counted in the
    manifest ("drop"), count as failed requests of the run without being served ("count"), or are an error ("refuse").
    ``check_units``: refuse a file whose times look like those of another unit. More than 100 requests within a minute, or
    fractions of milliseconds, are seconds read as milliseconds more often than not. Dates have no unit, and are not checked.
    """

    failures: Failures = "refuse"
    check_units: bool = True

    def _span(self, notes: Notes) -> Span:
        return notes.every if self.failures == "count" else notes.served

    def _kept(self, table: pa.Table) -> pa.Table:
        return table if self.failures == "count" else table.filter(with_tokens(table))

    def _check(self, notes: Notes) -> None:
        if notes.first_empty is not None and self.failures == "refuse":
            line, prompt, output = notes.first_empty
            raise TraceError(
                f"{self.path}:{line}: a request of {prompt} prompt and {output} output tokens "
                "(workload.failures=drop leaves such requests out, count counts them as failed)"
            )
        if self.check_units and self._unit != "date":
            self._check_times(notes, self._span(notes))

    def _check_times(self, notes: Notes, span: Span) -> None:
        unit, span_s = _UNITS[self._unit], (span.last - span.first) / TICKS_PER_S[self._unit]
        if span.count > _MANY and span_s < _SHORT_S:
            sign = f"its {span.count} requests span {span_s:.3g} s"
        elif self._unit != "s" and notes.fractions:
            sign = "it has fractions"
        else:
            return
        raise TraceError(
            f"{self.path}: times are read as {unit}, and {sign}: are they in another unit? "
            "Set workload.time_unit, or workload.check_units=false if they are right"
        )

    def _check_blocks(self, notes: Notes, block_tokens: int) -> None:
        """Raise TraceError unless hashes cover about ``block_tokens`` tokens each."""
        if notes.every.count <= _MANY or not notes.blocks:
            return
        found = notes.hashed_tokens / notes.blocks
        # The last hash may stand for the rest of a prompt, so short prompts fill no block.
        least = min(block_tokens, notes.hashed_tokens / notes.every.count)
        if found > _BLOCK_FACTOR * block_tokens or found * _BLOCK_FACTOR < least:
            raise TraceError(
                f"{self.path}: a hash covers {found:.0f} tokens on average, not the {block_tokens} of a block: "
                "set workload.block_tokens, or null to leave that unchecked"
            )
