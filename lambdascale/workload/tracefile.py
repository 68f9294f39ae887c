"""Shared parts of the trace readers: scanning rows with their line numbers, counting malformed rows, the time window."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, ClassVar, Literal, NamedTuple

import numpy as np

from lambdascale.core import TraceError, UserError
from lambdascale.core.checks import LARGEST, shown
from lambdascale.workload.base import Provenance
from lambdascale.workload.columns import Columns, Floats, Ints, Streams, natural_period_s
from lambdascale.workload.shaping import ShapedWorkload, check_count

# A trace of more requests than this that spans less than this many seconds is suspected of another unit of time.
_MANY, _SHORT_S = 100, 60.0
_UNITS = {1: "seconds", 1000: "milliseconds"}


class Row(NamedTuple):
    """One request of a trace: ``time`` in ticks (``ticks_per_s`` of the reader), token counts, and the model's name if used."""

    time: float
    prompt_tokens: int
    output_tokens: int
    model: str = ""


class BadRow(ValueError):
    """A malformed row; the message names the mistake, the scan adds file and line."""


class FailedRow(Exception):
    """A request that the trace records as failed: dropped and counted, not malformed."""


class FilteredRow(Exception):
    """A row that the configuration asks to leave out."""


def whole_number(text: str, column: str) -> int:
    """Return the plain decimal ``text`` as a number from 0 to 999,999,999; BadRow otherwise."""
    digits = text.strip()
    if digits.isascii() and digits.isdigit() and len(digits) <= 9:
        return int(digits)
    raise BadRow(f"{column} must be a whole number of at most 9 digits, not {shown(text)}")


def real_number(text: str, column: str) -> float:
    """Return ``text`` as a finite number of at least 0; BadRow otherwise."""
    try:
        value = float(text) if "_" not in text else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= LARGEST:
        raise BadRow(f"{column} must be a number of at least 0 and at most {LARGEST:g}, not {shown(text)}")
    return value


@contextmanager
def opened(path: str, how_to_get: str = "") -> Iterator[tuple[IO[str], str]]:
    """Open ``path`` as text (UTF-8, any line ends, no byte-order mark); yield it and its SHA-256. TraceError if unreadable.

    ``how_to_get`` ends the error message of a missing file.
    """
    try:
        file = Path(path).expanduser()
        found, exists = file.is_file(), file.exists()
    except (RuntimeError, OSError) as error:  # a home directory of nobody, a name that is too long
        raise TraceError(f"cannot read the trace {shown(path)}: {error!s:.100}") from error
    if not found:
        raise TraceError(f"cannot read the trace {path}: {'not a file' if exists else 'no such file'}{how_to_get}")
    try:
        with file.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
        # Undecodable bytes become replacement characters, so that they surface as a bad row with its line number.
        with file.open(encoding="utf-8-sig", errors="replace") as text:
            yield text, digest
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error


def text_lines(lines: Iterable[str]) -> Iterator[tuple[int, tuple[str]]]:
    """Line number (from 1) and stripped text of every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if text := line.strip():
            yield number, (text,)


def csv_records(
    lines: Iterable[str], path: str | None, columns: tuple[str, ...]
) -> Iterator[tuple[int, tuple[str, ...] | BadRow]]:
    """Line number of every row after the header, with its fields under ``columns``; TraceError if the header lacks one.

    A row with a wrong number of fields gives a BadRow instead. The traces read here never quote a field, so a stray
    quotation mark spoils its own row and no other.
    """
    header: list[str] = []
    positions: list[int] = []
    for number, (text,) in text_lines(lines):
        fields = text.split(",")
        if not header:
            header = [name.strip() for name in fields]
            if missing := [name for name in columns if name not in header]:
                raise TraceError(f"{path}:{number}: the header lacks {', '.join(missing)}; it reads {shown(text)}")
            positions = [header.index(name) for name in columns]
        elif len(fields) != len(header):
            yield number, BadRow(f"{len(fields)} fields where the header has {len(header)}")
        else:
            yield number, tuple(fields[position] for position in positions)


@dataclass
class _Scan:
    """Rows and counts from one pass over a file."""

    rows: list[Row] = field(default_factory=list)
    seen: int = 0
    skipped: int = 0
    failed: int = 0
    first_fault: str = ""

    def why_empty(self) -> str:
        """Reason why ``rows`` is empty, for an error message."""
        if self.skipped:
            return f"no usable row: {self.skipped} of {self.seen} are malformed, the first at {self.first_fault}"
        return f"none of the {self.seen} rows is left after filtering" if self.seen else "the trace has no rows"


@dataclass(frozen=True, kw_only=True)
class TraceFile(ShapedWorkload):
    """Base of the readers: a file of one request a row, sorted by time here and counted from its earliest row.

    ``start_s`` and ``duration_s`` (None: to the end) choose a window of the trace. A malformed row is a TraceError with
    file and line (counted from 1, header included) unless ``skip_bad_rows``, which leaves such rows out and counts them.
    A file without a usable row is a TraceError; a window without one is an empty workload.
    """

    path: str | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    skip_bad_rows: bool = False

    ticks_per_s: ClassVar[int] = 1
    how_to_get: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.path:
            raise UserError(f"{type(self).__name__} needs a file: set workload.path=FILE{self.how_to_get}")
        self._within("start_s", low=0.0)
        self._within("duration_s", low=0.0)

    @abstractmethod
    def _records(self, lines: Iterable[str]) -> Iterator[tuple[int, tuple[str, ...] | BadRow]]:
        """Line number and raw fields of each row."""

    @abstractmethod
    def _row(self, record: tuple[str, ...]) -> Row:
        """Row that the raw fields describe; raises BadRow, FailedRow or FilteredRow."""

    def _produce(self, streams: Streams, most: float) -> tuple[Columns, Provenance]:
        assert self.path is not None, "checked on construction"
        scan = _Scan()
        with opened(self.path, self.how_to_get) as (lines, digest):
            for number, record in self._records(lines):
                self._sort_out(scan, number, record)
        if not scan.rows:
            raise TraceError(f"{self.path}: {scan.why_empty()}")
        check_count(len(scan.rows) * self._requests_per_row, most)
        self._check_units([row.time for row in scan.rows])
        provenance = Provenance(
            source=self.path, sha256=digest, rows=scan.seen, skipped_rows=scan.skipped, dropped_failures=scan.failed
        )
        return self._windowed(self._columns(scan.rows, streams)), provenance

    def _check_units(self, ticks: list[float]) -> None:
        """Raise TraceError if the times are hardly in ``ticks_per_s``."""

    def _sort_out(self, scan: _Scan, number: int, record: tuple[str, ...] | BadRow) -> None:
        scan.seen += 1
        try:
            if isinstance(record, BadRow):
                raise record
            scan.rows.append(self._row(record))
        except FilteredRow:
            return
        except FailedRow:
            scan.failed += 1
        except BadRow as fault:
            if not self.skip_bad_rows:
                raise TraceError(f"{self.path}:{number}: {fault} (skip_bad_rows=true leaves such rows out)") from None
            scan.skipped += 1
            scan.first_fault = scan.first_fault or f"line {number}: {fault}"

    @property
    def _requests_per_row(self) -> int:
        return 1

    def _columns(self, rows: list[Row], streams: Streams) -> Columns:
        times = self._arrival_times([row.time for row in rows], streams)
        names, positions = self._trace_models(rows)
        columns = Columns(
            arrival_s=times,
            prompt_tokens=np.array([row.prompt_tokens for row in rows], dtype=np.int64),
            output_tokens=np.array([row.output_tokens for row in rows], dtype=np.int64),
            period_s=natural_period_s(times),
            trace_model=positions,
            trace_models=names,
        )
        return columns.at(times - times.min())

    def _arrival_times(self, ticks: list[float], streams: Streams) -> Floats:
        # Subtracting integer ticks keeps the 100 ns that a date stored as a double would lose.
        first = min(ticks)
        return np.array([(tick - first) / self.ticks_per_s for tick in ticks])

    def _trace_models(self, rows: list[Row]) -> tuple[tuple[str, ...], Ints | None]:
        return (), None

    def _windowed(self, columns: Columns) -> Columns:
        length_s = np.inf if self.duration_s is None else self.duration_s
        times = columns.arrival_s - self.start_s
        inside = np.flatnonzero((times >= 0) & (times < length_s))
        rest_s = max(columns.period_s - self.start_s, 0.0)
        return replace(columns.take(inside), arrival_s=times[inside], period_s=min(rest_s, length_s))


@dataclass(frozen=True, kw_only=True)
class TokenTrace(TraceFile):
    """Base of the readers of token counts.

    ``zero_tokens``: a request without tokens is a malformed row ("refuse"), is left out and counted as failed ("drop"), or has
    one token ("serve").
    """

    zero_tokens: Literal["refuse", "drop", "serve"] = "refuse"

    def _tokens(self, prompt: int, output: int) -> tuple[int, int]:
        """Token counts of a row as ``zero_tokens`` wants them; raises BadRow or FailedRow."""
        if prompt and output:
            return prompt, output
        if self.zero_tokens == "refuse":
            raise BadRow(f"a request of {prompt} prompt and {output} output tokens (zero_tokens=drop or serve accepts it)")
        if self.zero_tokens == "drop":
            raise FailedRow
        return max(prompt, 1), max(output, 1)


@dataclass(frozen=True, kw_only=True)
class UndatedTrace(TokenTrace):
    """Base of the readers of times that are plain numbers.

    ``check_units``: refuse a file whose times look like those of another unit. More than 100 requests within a minute, or
    fractions of milliseconds, are seconds read as milliseconds more often than not.
    """

    check_units: bool = True

    def _check_units(self, ticks: list[float]) -> None:
        unit, span_s = _UNITS[self.ticks_per_s], (max(ticks) - min(ticks)) / self.ticks_per_s
        if len(ticks) > _MANY and span_s < _SHORT_S:
            sign = f"its {len(ticks)} requests span {span_s:.3g} s"
        elif self.ticks_per_s > 1 and not all(float(tick).is_integer() for tick in ticks):
            sign = "it has fractions"
        else:
            return
        if self.check_units:
            raise TraceError(
                f"{self.path}: times are read as {unit}, and {sign}: are they in another unit? "
                "Convert them, or set workload.check_units=false if they are right"
            )
