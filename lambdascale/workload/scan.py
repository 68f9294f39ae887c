"""Passes over trace files: blocks of bounded size, and notes on all of the file that outlast its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from lambdascale.core import TraceError
from lambdascale.core.checks import shown
from lambdascale.workload.decoders import Block, Decoder

BLOCK_BYTES = 8 << 20


class Span(msgspec.Struct):
    """Number of requests, and the times in ticks of the earliest and the latest."""

    count: int = 0
    first: int | float = 0
    last: int | float = 0

    def add(self, times: pa.ChunkedArray) -> None:
        """Include the times of further requests."""
        if not len(times):
            return
        ends = pc.min_max(times).as_py()
        self.first = min(self.first, ends["min"]) if self.count else ends["min"]
        self.last = max(self.last, ends["max"]) if self.count else ends["max"]
        self.count += len(times)


class Notes(msgspec.Struct):
    """Facts of a whole file: digest of its bytes, counts of its rows, spans of all requests and of those with tokens.

    ``faults`` and ``first_empty`` name the line of the first malformed row and of the first request without tokens. ``blocks``
    counts the hashes of rows that have any, and ``hashed_tokens`` their prompt tokens.
    """

    sha256: str = ""
    seen: int = 0
    skipped: int = 0
    first_fault: tuple[int, str] | None = None
    first_empty: tuple[int, int, int] | None = None
    every: Span = msgspec.field(default_factory=Span)
    served: Span = msgspec.field(default_factory=Span)
    fractions: bool = False
    blocks: int = 0
    hashed_tokens: int = 0
    models: list[str] = msgspec.field(default_factory=list)

    def add(self, block: Block) -> None:
        """Include a further block."""
        table = block.table
        self.seen += block.seen
        self.skipped += block.skipped
        self.first_fault = self.first_fault or block.first_fault
        if self.first_empty is None and block.first_empty is not None:
            line, row = block.first_empty
            self.first_empty = (line, row.prompt_tokens, row.output_tokens)
        time = table["time"]
        self.every.add(time)
        self.served.add(time.filter(with_tokens(table)))
        if pa.types.is_floating(time.type):
            self.fractions |= bool(pc.any(pc.not_equal(time, pc.floor(time))).as_py())
        hashed = pc.greater(table["blocks"], 0)
        self.blocks += pc.sum(table["blocks"], min_count=0).as_py()
        self.hashed_tokens += pc.sum(table["prompt_tokens"].filter(hashed), min_count=0).as_py()
        self.models = sorted({*self.models, *pc.unique(table["model"]).to_pylist()})

    def why_empty(self) -> str:
        """Reason why no request is left, for an error message."""
        if self.skipped and self.first_fault:
            line, fault = self.first_fault
            return f"no usable row: {self.skipped} of {self.seen} are malformed, the first at line {line}: {fault}"
        return f"none of the {self.seen} rows is left after filtering" if self.seen else "the trace has no rows"


def with_tokens(table: pa.Table) -> pa.ChunkedArray:
    """True for the requests that have prompt and output tokens."""
    return pc.and_(pc.greater(table["prompt_tokens"], 0), pc.greater(table["output_tokens"], 0))


@contextmanager
def opened(path: str, how_to_get: str = "") -> Iterator[BufferedReader]:
    """Open ``path``; TraceError if it cannot be read, whose message ends with ``how_to_get`` if the file is missing."""
    try:
        file = Path(path).expanduser()
        found, exists = file.is_file(), file.exists()
    except (RuntimeError, OSError) as error:  # the home directory of an unknown user, a name that is too long
        raise TraceError(f"cannot read the trace {shown(path)}: {error!s:.100}") from error
    if not found:
        raise TraceError(f"cannot read the trace {path}: {'not a file' if exists else 'no such file'}{how_to_get}")
    try:
        with file.open("rb") as raw:
            yield raw
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error


def scan(file: IO[bytes], decoder: Decoder, keep: Callable[[pa.Table], Any], *, skip: bool) -> Notes:
    """Decode a whole file, hand the table of each block to ``keep`` and return the notes; TraceError as for the decoder."""
    notes, digest, number = Notes(), hashlib.sha256(), 1
    for block in _blocks(file, digest.update):
        decoded = _decoded(decoder, block, number, notes, skip)
        number += decoded.lines
        notes.add(decoded)
        keep(decoded.table)
    notes.sha256 = digest.hexdigest()
    return notes


def _blocks(file: IO[bytes], read: Callable[[bytes], None]) -> Iterator[bytes]:
    """Blocks that end with a line, without a byte-order mark; ``read`` is told all bytes of the file."""
    rest, first = b"", True
    while piece := file.read(BLOCK_BYTES):
        read(piece)
        data = rest + piece
        if first:
            data = data.removeprefix(b"\xef\xbb\xbf")
            # The header stands alone, so that the rest of a small file is decoded by columns too.
            head, end, data = data.partition(b"\n")
            yield head + end
            first = False
        cut = data.rfind(b"\n") + 1
        rest = data[cut:]
        if cut:
            yield data[:cut]
    if rest:
        yield rest


def _decoded(decoder: Decoder, block: bytes, number: int, notes: Notes, skip: bool) -> Block:
    found = decoder.fast(block)
    if found is not None:
        table, seen = found
        # Lines are counted in the slow way only: to name the first request without tokens.
        if notes.first_empty is not None or pc.all(with_tokens(table), min_count=0).as_py():
            return Block(table, seen, block.count(b"\n") + (not block.endswith(b"\n")))
    return decoder.by_line(block, number, skip=skip)
