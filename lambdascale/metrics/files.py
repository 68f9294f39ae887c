"""Tables and documents on disk, byte for byte the same for the same content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lambdascale.core import UserError


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file (zstd), without metadata that could differ between runs."""
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd")


def read_table(path: Path) -> pa.Table:
    """Read a parquet file."""
    return pq.read_table(path)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write an indented JSON object; ValueError for NaN."""
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, and rename the file that the block writes there, so that nobody finds a part of it.

    UserError if the system refuses; nothing is left of a block that fails.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all; UserError if that fails."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
