"""Decoders of trace files: blocks of lines in, tables of requests out.

A block that is as its format describes it is decoded by Arrow, columns at a time. Any other is decoded line by line, which finds
the line of each mistake: both ways accept the same rows.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from lambdascale.core import TraceError
from lambdascale.core.checks import LARGEST, shown
from lambdascale.workload.rows import YEARS, BadRow, FilteredRow, Row, real_number, timestamp_ns, whole_number

TimeUnit = Literal["s", "ms", "us", "ns", "date"]
TICKS_PER_S: Mapping[TimeUnit, int] = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9, "date": 10**9}
COLUMNS = ("time", "prompt_tokens", "output_tokens", "model", "session", "blocks")


def schema(unit: TimeUnit) -> pa.Schema:
    """Columns of a table of requests; dates are nanoseconds since 1970, other times numbers of their unit."""
    time = pa.int64() if unit == "date" else pa.float64()
    types = (time, pa.int64(), pa.int64(), pa.string(), pa.string(), pa.int64())
    return pa.schema(list(zip(COLUMNS, types, strict=True)))


@dataclass
class Block:
    """Requests of one block: a table, counts of its rows and of malformed ones, and (line, mistake) of the first of those.

    ``first_empty`` is (line, row) of the first request without tokens, None without one or where nobody looked.
    """

    table: pa.Table
    seen: int
    lines: int
    skipped: int = 0
    first_fault: tuple[int, str] | None = None
    first_empty: tuple[int, Row] | None = None


class Decoder(ABC):
    """Base of the decoders; one object per pass over a file, since a decoder remembers the header.

    ``hint`` ends the message about a malformed row.
    """

    hint = " (workload.skip_bad_rows=true leaves such rows out)"

    def __init__(self, path: str, unit: TimeUnit = "s") -> None:
        self.path = path
        self.unit = unit

    @abstractmethod
    def rows(self, text: str, number: int) -> list[Row] | None:
        """Requests of the line ``number``, not blank; None for a header. BadRow, FilteredRow or TraceError."""

    def fast(self, block: bytes) -> tuple[pa.Table, int] | None:
        """Decode a whole block, with the number of its rows before filters; None if it must be taken line by line."""
        return None

    def by_line(self, block: bytes, number: int, *, skip: bool) -> Block:
        """Decode a block whose first line is ``number``, line by line; TraceError for a malformed row unless ``skip``."""
        found: list[Row] = []
        result = Block(schema(self.unit).empty_table(), 0, 0)
        # Undecodable bytes become replacement characters, so that they surface as a bad row with its line number.
        for line in io.TextIOWrapper(io.BytesIO(block), encoding="utf-8", errors="replace"):
            at = number + result.lines
            result.lines += 1
            if text := line.strip():
                self._take(text, at, result, found, skip)
        columns = list(zip(*found, strict=True)) if found else [()] * len(COLUMNS)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema(self.unit), strict=True)]
        result.table = pa.table(arrays, schema=schema(self.unit))
        return result

    def _take(self, text: str, number: int, result: Block, found: list[Row], skip: bool) -> None:
        try:
            rows = self.rows(text, number)
            if rows is None:
                return
        except FilteredRow:
            rows = []
            result.seen += 1
        except BadRow as fault:
            if not skip:
                raise TraceError(f"{self.path}:{number}: {fault}{self.hint}") from None
            result.seen += 1
            result.skipped += 1
            result.first_fault = result.first_fault or (number, str(fault))
            return
        result.seen += len(rows)
        found += rows
        if result.first_empty is None:
            result.first_empty = next(((number, row) for row in rows if not (row.prompt_tokens and row.output_tokens)), None)

    def time(self, text: str, column: str) -> float:
        """Time of a row in ticks; BadRow for a text that is none."""
        return timestamp_ns(text, column) if self.unit == "date" else real_number(text, column)


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names of a trace's columns; None for those not used. ``keep`` maps a column to the only text to keep, ``refused`` one that
    no file may have to the reason.
    """

    time: str
    prompt: str
    output: str
    model: str | None = None
    session: str | None = None
    parent: str | None = None
    hashes: str | None = None
    rows: str | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def used(self) -> list[str]:
        """Names of a table's columns that must exist, once each."""
        names = (self.time, self.prompt, self.output, self.model, self.session, *self.keep)
        return list(dict.fromkeys(name for name in names if name is not None))


class CsvDecoder(Decoder):
    """Comma-separated values with a header. The traces read here never quote a field, so a stray quotation mark spoils its own
    row and no other.
    """

    def __init__(self, path: str, unit: TimeUnit, names: Names) -> None:
        super().__init__(path, unit)
        self._names = names
        self._header: list[str] = []

    def rows(self, text: str, number: int) -> list[Row] | None:
        """Request of a line."""
        fields = text.split(",")
        if not self._header:
            self._read_header(fields, text, number)
            return None
        if len(fields) != len(self._header):
            raise BadRow(f"{len(fields)} fields where the header has {len(self._header)}")
        of, names = dict(zip(self._header, fields, strict=True)), self._names
        row = Row(
            self.time(of[names.time], names.time),
            whole_number(of[names.prompt], names.prompt),
            whole_number(of[names.output], names.output),
            of[names.model].strip() if names.model else "",
            of[names.session].strip() if names.session else "",
        )
        if any(of[column].strip() != text for column, text in names.keep.items()):
            raise FilteredRow
        return [row]

    def _read_header(self, fields: list[str], text: str, number: int) -> None:
        header = [name.strip() for name in fields]
        if missing := [name for name in self._names.used() if name not in header]:
            raise TraceError(f"{self.path}:{number}: the header lacks {', '.join(missing)}; it reads {shown(text)}")
        if twice := [name for name in self._names.used() if header.count(name) > 1]:
            raise TraceError(f"{self.path}:{number}: the header names {twice[0]} twice")
        for name in self._names.refused:
            if name in header:
                raise TraceError(f"{self.path}:{number}: the trace has {name}: {self._names.refused[name]}")
        # Columns that nobody reads may share a name.
        self._header = [name if name in self._names.used() else f"\0{at}" for at, name in enumerate(header)]

    def fast(self, block: bytes) -> tuple[pa.Table, int] | None:
        """Decode by Arrow."""
        if not self._header or b'"' in block or b"\r" in block or b"\0" in block:
            return None
        used = self._names.used()
        try:
            texts = csv.read_csv(
                pa.BufferReader(block),
                csv.ReadOptions(column_names=self._header, block_size=len(block) + 1, use_threads=False),
                csv.ParseOptions(quote_char=False, double_quote=False),
                csv.ConvertOptions(
                    include_columns=used, column_types=dict.fromkeys(used, pa.string()), strings_can_be_null=False
                ),
            )
            return self._numbers(texts), texts.num_rows
        except (pa.ArrowInvalid, _IrregularError):
            return None

    def _numbers(self, texts: pa.Table) -> pa.Table:
        names, count = self._names, texts.num_rows
        time = _dates(texts[names.time]) if self.unit == "date" else _reals(texts[names.time])
        prompt, output = _wholes(texts[names.prompt]), _wholes(texts[names.output])
        blank = pa.repeat(pa.scalar(""), count)
        model, session = (
            blank if name is None else pc.utf8_trim_whitespace(texts[name]) for name in (names.model, names.session)
        )
        blocks = pa.repeat(pa.scalar(0, pa.int64()), count)
        table = pa.table([time, prompt, output, model, session, blocks], schema=schema(self.unit))
        for column, text in names.keep.items():
            table = table.filter(pc.equal(pc.utf8_trim_whitespace(texts[column]), text).combine_chunks())
            texts = texts.filter(pc.equal(pc.utf8_trim_whitespace(texts[column]), text))
        return table


class _IrregularError(Exception):
    """A block that is not written as its format usually is."""


def _matching(texts: pa.ChunkedArray, pattern: str) -> pa.ChunkedArray:
    if not pc.all(pc.match_substring_regex(texts, pattern), min_count=0).as_py():
        raise _IrregularError
    return texts


def _wholes(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return _matching(texts, "^[0-9]{1,9}$").cast(pa.int64())


def _reals(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return _matching(texts, r"^[0-9]{1,15}(\.[0-9]{1,12})?$").cast(pa.float64())


def _dates(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    pattern = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|\+00:00)?$"
    _matching(texts, pattern)
    seconds = pc.utf8_slice_codeunits(texts, 0, 19).cast(pa.timestamp("s"))
    years = pc.min_max(pc.year(seconds)).as_py()
    if years["min"] is not None and not (years["min"] in YEARS and years["max"] in YEARS):
        raise _IrregularError
    fraction = pc.replace_substring_regex(pc.utf8_slice_codeunits(texts, 19), r"^\.|Z$|\+00:00$", "")
    # "Z" alone, or a zone alone, leaves nothing, as a whole second does.
    nanoseconds = pc.utf8_rpad(pc.replace_substring_regex(fraction, r"Z$|\+00:00$", ""), 9, "0").cast(pa.int64())
    return pc.add(pc.multiply(seconds.cast(pa.int64()), 10**9), nanoseconds)


class JsonDecoder(Decoder):
    """One JSON object a line: a request, or with ``rows`` a session that holds its requests.

    In a session, an entry that holds requests of its own is a session within it, whose times count from the entry's.
    """

    def __init__(self, path: str, unit: TimeUnit, names: Names) -> None:
        super().__init__(path, unit)
        self._names = names
        self._decode = msgspec.json.Decoder(_session_struct(names) if names.rows else _row_struct(unit, names)).decode
        self._session_of: dict[str, str] = {}

    def rows(self, text: str, number: int) -> list[Row]:
        """Requests of a line."""
        try:
            found: Any = self._decode(text)
        except RecursionError:
            raise BadRow("the line is nested too deeply") from None
        except (UnicodeError, msgspec.MsgspecError) as error:
            hint = "" if text.lstrip().startswith("{") else " (workload.format=csv reads CSV)"
            raise BadRow(f"{error}, in {shown(text)}{hint}") from None
        if self._names.rows is None:
            return [self._row(found, self._session(found))]
        session = found.session if self._names.session else f"line {number}"
        return [self._row(each, session, start) for each, start in _flat(found.rows, 0.0, self._names)]

    def _row(self, found: Any, session: str, start: float = 0.0) -> Row:
        time = timestamp_ns(found.time, self._names.time) if self.unit == "date" else start + found.time
        return Row(time, found.prompt, found.output, getattr(found, "model", ""), session, len(getattr(found, "hashes", ())))

    def _session(self, found: Any) -> str:
        if self._names.session is None:
            return ""
        own = str(found.session)
        if self._names.parent is None:
            return own
        self._session_of[own] = session = self._session_of.get(str(found.parent), own)
        return session


_TOKENS = Annotated[int, msgspec.Meta(ge=0, lt=10**9)]
_TIME = Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]


def _optional(names: Names) -> tuple[list[Any], dict[str, str]]:
    """Fields for the columns that not every trace has, and their names in the file."""
    found: list[Any] = []
    renamed: dict[str, str] = {}
    for name, column, kind in (("model", names.model, str), ("hashes", names.hashes, list[Any])):
        if column is not None:
            found.append((name, kind) if name == "model" else (name, kind, msgspec.field(default_factory=list)))
            renamed[name] = column
    return found, renamed


def _row_struct(unit: TimeUnit, names: Names) -> type[msgspec.Struct]:
    optional, renamed = _optional(names)
    fields = [("time", str if unit == "date" else _TIME), ("prompt", _TOKENS), ("output", _TOKENS), *optional]
    renamed |= {"time": names.time, "prompt": names.prompt, "output": names.output}
    for name, column in (("session", names.session), ("parent", names.parent)):
        if column is not None:
            fields.append((name, str | int))
            renamed[name] = column
    return msgspec.defstruct("Request", fields, rename=renamed, kw_only=True)


def _session_struct(names: Names) -> type[msgspec.Struct]:
    optional, renamed = _optional(names)
    entry = msgspec.defstruct(
        "Request",
        [
            ("time", _TIME | None, None),
            ("prompt", _TOKENS | None, None),
            ("output", _TOKENS | None, None),
            ("rows", list[Any] | None, None),
            *((each[0], each[1], "") if each[0] == "model" else each for each in optional),
        ],
        rename=renamed | {"time": names.time, "prompt": names.prompt, "output": names.output, "rows": str(names.rows)},
        kw_only=True,
    )
    own: list[Any] = [("rows", list.__class_getitem__(entry))]
    renamed = {"rows": str(names.rows)}
    if names.session is not None:
        own.append(("session", str))
        renamed["session"] = names.session
    return msgspec.defstruct("Session", own, rename=renamed, kw_only=True)


def _flat(entries: list[Any], start: float, names: Names, depth: int = 0) -> Iterator[tuple[Any, float]]:
    """Requests of a session, with the time from which theirs count."""
    latest = 0.0
    for entry in entries:
        at = latest if entry.time is None else entry.time
        latest = at
        if entry.rows is not None:
            if depth > 50:
                raise BadRow("sessions are nested too deeply")
            try:
                inner = msgspec.convert(entry.rows, list.__class_getitem__(type(entry)))
            except msgspec.ValidationError as error:
                raise BadRow(f"{error}, in {names.rows} of an entry") from None
            yield from _flat(inner, start + at, names, depth + 1)
        elif entry.time is None or entry.prompt is None or entry.output is None:
            raise BadRow(f"an entry of {names.rows} lacks {names.time}, {names.prompt} or {names.output}")
        else:
            yield entry, start


class TimesDecoder(Decoder):
    """A list of times, or of other numbers (``what``), one a line; ``#`` starts a comment. Each request has one token."""

    def __init__(self, path: str, what: str = "an arrival time", hint: str = Decoder.hint) -> None:
        super().__init__(path)
        self._what = what
        self.hint = hint

    def rows(self, text: str, number: int) -> list[Row] | None:
        """Request of a line, None for a comment."""
        time = text.partition("#")[0].strip()
        return [Row(real_number(time, self._what), 1, 1)] if time else None
