"""Readers of public request traces: Azure LLM inference, BurstGPT, Mooncake, and plain lists of arrival times."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from lambdascale.core.checks import LARGEST, require, shown
from lambdascale.workload.columns import Columns, Floats, Ints, Streams
from lambdascale.workload.lengths import LengthsMixin
from lambdascale.workload.tracefile import (
    BadRow,
    FailedRow,
    FilteredRow,
    Row,
    TokenTrace,
    TraceFile,
    UndatedTrace,
    csv_records,
    real_number,
    text_lines,
    whole_number,
)

_TIMESTAMP = re.compile(
    r"(?P<second>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d{1,9}))?(?P<zone>Z|[+-]\d\d:\d\d)?", re.ASCII
)


def timestamp_ns(text: str) -> int:
    """Nanoseconds since 1970 of ``2023-11-16 18:15:46.6805900``, UTC unless a zone follows; BadRow for anything else."""
    match = _TIMESTAMP.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        whole = datetime.fromisoformat(match["second"] + (match["zone"] or "Z"))
    except ValueError:
        raise BadRow(f"TIMESTAMP must look like 2023-11-16 18:15:46.6805900, not {shown(text)}") from None
    return int(whole.timestamp()) * 10**9 + int((match["fraction"] or "0").ljust(9, "0"))


@dataclass(frozen=True, kw_only=True)
class AzureTrace(TokenTrace):
    """Azure LLM inference traces, 2023 and 2024 (CSV: TIMESTAMP, ContextTokens, GeneratedTokens; CC-BY-4.0).

    Times are read to the nanosecond: the files have seven decimals, one more than Python's datetime keeps.
    """

    ticks_per_s: ClassVar[int] = 10**9
    how_to_get: ClassVar[str] = " (python scripts/fetch_traces.py azure_2023_conv downloads one)"

    def _records(self, lines: Iterable[str]) -> Iterator[tuple[int, tuple[str, ...] | BadRow]]:
        return csv_records(lines, self.path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))

    def _row(self, record: tuple[str, ...]) -> Row:
        time, prompt, output = record
        counts = whole_number(prompt, "ContextTokens"), whole_number(output, "GeneratedTokens")
        return Row(timestamp_ns(time), *self._tokens(*counts))


@dataclass(frozen=True, kw_only=True)
class BurstGptTrace(UndatedTrace):
    """BurstGPT (CSV: Timestamp in seconds, Model, Request tokens, Response tokens, Total tokens, Log Type; CC-BY-4.0).

    The trace has whole seconds: ``spread_within_second`` adds a uniform fraction to each. ``log_type`` keeps only
    "Conversation log" or "API log". Failed requests have no response tokens: ``drop_failures`` leaves them out, whatever their
    prompt, and counts them, otherwise they ask for one output token. ``use_trace_models`` maps the trace's models, in
    alphabetical order, to the run's models in the order of the configuration, instead of ``popularity``.
    """

    spread_within_second: bool = False
    log_type: str | None = None
    drop_failures: bool = True
    use_trace_models: bool = False

    how_to_get: ClassVar[str] = " (python scripts/fetch_traces.py burstgpt_1 downloads one)"

    def _records(self, lines: Iterable[str]) -> Iterator[tuple[int, tuple[str, ...] | BadRow]]:
        return csv_records(lines, self.path, ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type"))

    def _row(self, record: tuple[str, ...]) -> Row:
        time_s = real_number(record[0], "Timestamp")
        prompt, output = (whole_number(record[at], f"{name} tokens") for at, name in ((2, "Request"), (3, "Response")))
        if self.log_type is not None and record[4].strip() != self.log_type:
            raise FilteredRow
        if output == 0 and self.drop_failures:
            raise FailedRow
        return Row(time_s, *self._tokens(prompt, max(output, 1)), record[1].strip())

    def _arrival_times(self, ticks: list[float], streams: Streams) -> Floats:
        times = super()._arrival_times(ticks, streams)
        return times + streams.arrivals.random(len(times)) if self.spread_within_second else times

    def _trace_models(self, rows: list[Row]) -> tuple[tuple[str, ...], Ints | None]:
        if not self.use_trace_models:
            return (), None
        names = sorted({row.model for row in rows})
        positions = {name: index for index, name in enumerate(names)}
        return tuple(names), np.array([positions[row.model] for row in rows], dtype=np.int64)


class _MooncakeRow(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]
    input_length: Annotated[int, msgspec.Meta(ge=0, lt=10**9)]
    output_length: Annotated[int, msgspec.Meta(ge=0, lt=10**9)]


_decode_mooncake = msgspec.json.Decoder(_MooncakeRow).decode


@dataclass(frozen=True, kw_only=True)
class MooncakeTrace(UndatedTrace):
    """Mooncake's traces (JSON lines: timestamp in ms, input_length, output_length; hash_ids is not used; Apache-2.0)."""

    ticks_per_s: ClassVar[int] = 1000
    how_to_get: ClassVar[str] = " (python scripts/fetch_traces.py mooncake_conversation downloads one)"

    def _records(self, lines: Iterable[str]) -> Iterator[tuple[int, tuple[str, ...] | BadRow]]:
        return text_lines(lines)

    def _row(self, record: tuple[str, ...]) -> Row:
        try:
            row = _decode_mooncake(record[0])
        except RecursionError:
            raise BadRow("the line is nested too deeply") from None
        except (UnicodeError, msgspec.MsgspecError) as error:
            raise BadRow(f"{error}, in {shown(record[0])}") from None
        return Row(row.timestamp, *self._tokens(row.input_length, row.output_length))


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

    def _records(self, lines: Iterable[str]) -> Iterator[tuple[int, tuple[str, ...] | BadRow]]:
        return text_lines(line.partition("#")[0] for line in lines)

    def _row(self, record: tuple[str, ...]) -> Row:
        return Row(real_number(record[0], "an arrival time"), 1, 1)

    def _columns(self, rows: list[Row], streams: Streams) -> Columns:
        arrivals = super()._columns(rows, streams)
        columns = arrivals.take(np.repeat(np.arange(len(arrivals)), self.requests_per_arrival))
        prompt, output = self._draw_lengths(len(columns), streams.lengths)
        return replace(columns, prompt_tokens=prompt, output_tokens=output)
