"""Readers of request traces: timed traces with the columns of any tool, their presets, and plain lists of arrival times."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lambdascale.core.checks import require, shown
from lambdascale.workload.columns import Columns, Floats, Streams
from lambdascale.workload.decoders import CsvDecoder, Decoder, JsonDecoder, Names, TimesDecoder, TimeUnit
from lambdascale.workload.lengths import LengthsMixin
from lambdascale.workload.scan import Notes, Span
from lambdascale.workload.tracefile import Failures, TokenTrace, TraceFile

# Fields that decide how a line is read; others choose among what was read.
_OF_DECODER = ("format", "time_unit")
_COLUMNS = (
    "time_column",
    "prompt_column",
    "output_column",
    "model_column",
    "session_column",
    "parent_column",
    "hash_column",
    "rows_column",
)

_NOT_IN_NAMES = re.compile(r'[\x00-\x1f"\\]')  # msgspec takes no such names


@dataclass(frozen=True, kw_only=True)
class TimedTrace(TokenTrace):
    """A trace of times and token counts, whatever its columns are called. Defaults: those of vLLM's timed traces.

    ``format``: JSON lines or CSV with a header. ``time_unit``: unit of the times, which are numbers, or "date" for dates.
    ``model_column`` maps the trace's models, in alphabetical order, to the run's models in the order of the configuration,
    instead of ``popularity``. ``session_column`` names the session of each request: a session has one model, and tables name
    it; with ``parent_column`` (JSON) it names the request instead, and a request belongs to the session of its parent.
    ``hash_column`` (JSON) and ``block_tokens``: list of hashes of the prompt's blocks and the tokens of a block; hashes are
    not used, but a file whose hashes cover more or fewer tokens is refused (None: unchecked). ``rows_column`` (JSON): a line
    is a session whose requests are listed there, with times from its beginning; beginnings are a Poisson process with a mean
    gap of ``session_gap_s``.
    """

    format: Literal["jsonl", "csv"] = "jsonl"
    time_column: str = "timestamp"
    time_unit: TimeUnit = "s"
    prompt_column: str = "input_length"
    output_column: str = "output_length"
    model_column: str | None = None
    session_column: str | None = None
    parent_column: str | None = None
    hash_column: str | None = "hash_ids"
    block_tokens: int | None = None
    rows_column: str | None = None
    session_gap_s: float | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        name = type(self).__name__
        named = [value for column in _COLUMNS if (value := getattr(self, column)) is not None]
        require(all(named) and len(set(named)) == len(named), f"{name} needs different names of columns, not {shown(named, 200)}")
        odd = [value for value in named if self.format == "jsonl" and _NOT_IN_NAMES.search(value)]
        require(not odd, f"{name}: names of JSON fields have no quotes, backslashes or control characters here, not {shown(odd)}")
        self._within("block_tokens", low=1)
        self._within("session_gap_s", low=0.0)
        for only in ("parent_column", "hash_column", "rows_column"):
            require(
                self.format == "jsonl" or getattr(self, only) is None,
                f"{name}.{only} needs format=jsonl, not {self.format}: set workload.{only}=null",
            )
        require(self.block_tokens is None or self.hash_column is not None, f"{name}.block_tokens needs a hash_column")
        require(self.parent_column is None or self.session_column is not None, f"{name}.parent_column needs a session_column")
        require(self.parent_column is None or self.rows_column is None, f"{name} has a parent_column or a rows_column, not both")
        require(
            (self.rows_column is None) == (self.session_gap_s is None),
            f"{name}: rows_column and session_gap_s belong together, since times count from the beginning of a session",
        )
        require(self.rows_column is None or self.time_unit == "s", f"{name}.rows_column needs time_unit=s, not {self.time_unit}")

    @property
    def _unit(self) -> TimeUnit:
        return self.time_unit

    def _keep(self) -> dict[str, str]:
        """Columns of which only one text is kept."""
        return {}

    def _refused(self) -> dict[str, str]:
        """Columns that mean something this package does not model, with the reason to refuse them."""
        return {}

    def _names(self) -> Names:
        return Names(
            time=self.time_column,
            prompt=self.prompt_column,
            output=self.output_column,
            model=self.model_column,
            session=self.session_column,
            parent=self.parent_column,
            hashes=None if self.block_tokens is None else self.hash_column,
            rows=self.rows_column,
            keep=self._keep(),
            refused=self._refused(),
        )

    def _decoder(self) -> Decoder:
        assert self.path is not None, "checked on construction"
        if self.format == "csv":
            return CsvDecoder(self.path, self.time_unit, self._names())
        return JsonDecoder(self.path, self.time_unit, self._names())

    def _key(self) -> str:
        names = self._names()
        parts = {field.name: getattr(names, field.name) for field in fields(names)}
        return json.dumps({name: getattr(self, name) for name in _OF_DECODER} | parts, sort_keys=True)

    def _check(self, notes: Notes) -> None:
        super()._check(notes)
        if self.block_tokens is not None:
            self._check_blocks(notes, self.block_tokens)

    def _labelled(self, columns: Columns, table: pa.Table, notes: Notes) -> Columns:
        if self.session_column is not None or self.rows_column is not None:
            columns = replace(columns, session=np.asarray(table["session"].to_pylist(), dtype=object))
        if self.model_column is None:
            return columns
        positions = pc.index_in(table["model"], value_set=pa.array(notes.models, pa.string()))
        return replace(columns, trace_model=np.asarray(positions.to_numpy(), dtype=np.int64), trace_models=tuple(notes.models))

    def _check_times(self, notes: Notes, span: Span) -> None:
        # Times that count from the beginning of a session say nothing about the length of the trace.
        if self.rows_column is None:
            super()._check_times(notes, span)

    @property
    def _moved(self) -> bool:
        return self.session_gap_s is not None

    def _drawn(self, times: Floats, table: pa.Table, streams: Streams) -> Floats:
        assert self.session_gap_s is not None, "only then are times drawn"
        _, first, sessions = np.unique(table["session"].to_pylist(), return_index=True, return_inverse=True)
        begin_s = np.cumsum(streams.arrivals.exponential(self.session_gap_s, len(first)))
        # Sessions begin in the order of the file.
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return np.asarray(times + begin_s[rank][sessions], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class AzureTrace(TimedTrace):
    """Azure LLM inference traces, 2023 and 2024 (CSV: TIMESTAMP, ContextTokens, GeneratedTokens; CC-BY-4.0).

    Times are read to the nanosecond: the files have seven decimals, one more than Python's datetime keeps. The traces of
    multimodal models add NumImages: ``images`` refuses them, or ignores the column and reads the requests as text.
    """

    format: Literal["jsonl", "csv"] = "csv"
    time_column: str = "TIMESTAMP"
    time_unit: TimeUnit = "date"
    prompt_column: str = "ContextTokens"
    output_column: str = "GeneratedTokens"
    hash_column: str | None = None
    images: Literal["refuse", "ignore"] = "refuse"

    def _refused(self) -> dict[str, str]:
        why = "images are not modelled (workload.images=ignore reads its requests as text)"
        return {} if self.images == "ignore" else {"NumImages": why}

    how_to_get: ClassVar[str] = " (python scripts/fetch_traces.py azure_2023_conv downloads one)"


@dataclass(frozen=True, kw_only=True)
class BurstGptTrace(TimedTrace):
    """BurstGPT (CSV: Timestamp in seconds, Model, Request tokens, Response tokens, Total tokens, Log Type; CC-BY-4.0).

    Version 1.2 adds Session ID and Elapsed time. The trace has whole seconds: ``spread_within_second`` adds a uniform fraction
    to each. ``log_type`` keeps only "Conversation log" or "API log". Failed requests have no response tokens.
    """

    format: Literal["jsonl", "csv"] = "csv"
    time_column: str = "Timestamp"
    prompt_column: str = "Request tokens"
    output_column: str = "Response tokens"
    hash_column: str | None = None
    failures: Failures = "drop"
    spread_within_second: bool = False
    log_type: str | None = None

    how_to_get: ClassVar[str] = " (python scripts/fetch_traces.py burstgpt_1 downloads one)"

    def _keep(self) -> dict[str, str]:
        return {} if self.log_type is None else {"Log Type": self.log_type}

    @property
    def _moved(self) -> bool:
        return self.spread_within_second

    def _drawn(self, times: Floats, table: pa.Table, streams: Streams) -> Floats:
        return times + streams.arrivals.random(len(times))


@dataclass(frozen=True, kw_only=True)
class MooncakeTrace(TimedTrace):
    """Mooncake's traces (JSON lines: timestamp in ms, input_length, output_length, hash_ids of 512 tokens; Apache-2.0)."""

    time_unit: TimeUnit = "ms"
    block_tokens: int | None = 512

    how_to_get: ClassVar[str] = " (python scripts/fetch_traces.py mooncake_conversation downloads one)"


@dataclass(frozen=True, kw_only=True)
class ArrivalsTrace(TraceFile, LengthsMixin):
    """A plain list of arrival times in seconds, one a line; ``#`` starts a comment.

    Each arrival stands for ``requests_per_arrival`` requests at the same time (the λScale authors replayed batches of 4
    prompts). Token counts come from ``lengths``.
    """

    requests_per_arrival: int = 1

    how_to_get: ClassVar[str] = " (python scripts/fetch_traces.py lambdascale_30min downloads one; workload=bursty needs none)"

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        require(
            self.requests_per_arrival >= 1,
            f"ArrivalsTrace.requests_per_arrival must be at least 1, not {self.requests_per_arrival!r}",
        )

    @property
    def _requests_per_row(self) -> int:
        return self.requests_per_arrival

    @property
    def _moved(self) -> bool:
        # Lengths are drawn for all of the trace too, so that a window does not change them.
        return True

    def _decoder(self) -> Decoder:
        assert self.path is not None, "checked on construction"
        return TimesDecoder(self.path)

    def _columns(self, table: pa.Table, notes: Notes, span: Span, streams: Streams) -> Columns:
        arrivals = super()._columns(table, notes, span, streams)
        columns = arrivals.take(np.repeat(np.arange(len(arrivals)), self.requests_per_arrival))
        prompt, output = self._draw_lengths(len(columns), streams.lengths)
        return replace(columns, prompt_tokens=prompt, output_tokens=output)
