"""Index of large trace files: decoded once, then read by time at a cost that follows the window and not the file.

An index is a Parquet file whose row groups state the range of their times. It is made by one pass over the trace in bounded
memory, kept in a folder of the user's cache, and made anew when size or time of change of the trace differ.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lambdascale.core import UserError
from lambdascale.core.checks import shown
from lambdascale.workload.decoders import Decoder, schema
from lambdascale.workload.scan import Notes, opened, scan

#: Smaller files are decoded for each run, which takes less than a second.
INDEXED_BYTES = 16 << 20
_GROUP_ROWS = 1 << 16
_VERSION = 1
_NOTES, _SOURCE = b"lambdascale.notes", b"lambdascale.source"


class Stored(Protocol):
    """Requests of a trace, with the notes on the whole file."""

    notes: Notes

    def between(self, low: float, high: float) -> pa.Table:
        """Requests from ``low`` to ``high`` ticks, in the order of the file."""
        ...


@dataclass
class InMemory:
    """Requests of a small file."""

    notes: Notes
    table: pa.Table

    def between(self, low: float, high: float) -> pa.Table:
        """Requests from ``low`` to ``high`` ticks, in the order of the file."""
        return _cut(self.table, low, high)


@dataclass
class Indexed:
    """Requests of a large file, read from its index."""

    notes: Notes
    path: Path
    groups_read: int = 0

    def between(self, low: float, high: float) -> pa.Table:
        """Requests from ``low`` to ``high`` ticks, from the row groups that reach there; UserError if the index is damaged."""
        try:
            with pq.ParquetFile(self.path) as file:
                ends = [file.metadata.row_group(at).column(0).statistics for at in range(file.metadata.num_row_groups)]
                groups = [at for at, times in enumerate(ends) if times.max >= low and times.min <= high]
                self.groups_read = len(groups)
                return _cut(file.read_row_groups(groups).replace_schema_metadata(), low, high)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"the index {self.path} of a trace is damaged, delete it: {error!s:.100}") from error


def _cut(table: pa.Table, low: float, high: float) -> pa.Table:
    times = table["time"].cast(pa.float64(), safe=False)
    return table.filter(pc.and_(pc.greater_equal(times, float(low)), pc.less_equal(times, float(high))))


def stored(path: str, how_to_get: str, decoder: Decoder, key: str, *, skip: bool) -> Stored:
    """Requests of the trace at ``path``; ``key`` names all settings of the decoder. TraceError for a malformed file."""
    with opened(path, how_to_get) as file:
        status = os.fstat(file.fileno())
        if status.st_size < INDEXED_BYTES:
            tables: list[pa.Table] = []
            notes = scan(file, decoder, tables.append, skip=skip)
            return InMemory(notes, pa.concat_tables([schema(decoder.unit).empty_table(), *tables]))
        source = f"{status.st_size} {status.st_mtime_ns}".encode()
        index = _folder() / _name(path, key)
        notes_of = _read_notes(index, source)
        if notes_of is None:
            try:
                notes_of = _write(index, source, file.name, decoder, skip)
            except OSError as error:
                hint = "set LAMBDASCALE_CACHE to a folder with room for it"
                raise UserError(
                    f"cannot write the index of {path} to {shown(str(index))}: {error.strerror or error}; {hint}"
                ) from error
        return Indexed(notes_of, index)


def _folder() -> Path:
    """Folder of the indexes: ``traces`` in $LAMBDASCALE_CACHE, or in lambdascale in the user's folder of caches."""
    if chosen := os.environ.get("LAMBDASCALE_CACHE"):
        return Path(chosen, "traces")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lambdascale", "traces")


def _name(path: str, key: str) -> str:
    """Name of the index of a trace: that of the trace, and a digest of its place and of the settings of its decoder."""
    place = Path(path).expanduser().resolve()
    digest = hashlib.sha256(f"{_VERSION}\0{place}\0{key}".encode(errors="replace")).hexdigest()[:16]
    return f"{place.stem[:60]}-{digest}.parquet"


def _read_notes(index: Path, source: bytes) -> Notes | None:
    """Notes of an index that was made from ``source``; None without one, or for one of other bytes or damaged."""
    try:
        metadata = pq.read_metadata(index).metadata or {}
        return msgspec.json.decode(metadata[_NOTES], type=Notes) if metadata.get(_SOURCE) == source else None
    except (OSError, pa.ArrowInvalid, KeyError, msgspec.MsgspecError):
        return None


def _write(index: Path, source: bytes, trace: str, decoder: Decoder, skip: bool) -> Notes:
    """Make the index under a temporary name and rename it when complete; return its notes."""
    index.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{index.stem}.", suffix=".tmp", dir=index.parent)
    os.close(handle)
    try:
        with (
            open(trace, "rb") as file,
            pq.ParquetWriter(draft, schema(decoder.unit), use_dictionary=["model", "session"]) as writer,
        ):

            def keep(table: pa.Table) -> None:
                if table.num_rows:
                    writer.write_table(table, row_group_size=_GROUP_ROWS)

            notes = scan(file, decoder, keep, skip=skip)
            writer.add_key_value_metadata({_NOTES: msgspec.json.encode(notes), _SOURCE: source})
        os.replace(draft, index)
    finally:
        Path(draft).unlink(missing_ok=True)
    return notes
