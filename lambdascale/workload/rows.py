"""Rows of request traces: the texts of a line, checked and turned into numbers."""

from __future__ import annotations

import re
from datetime import datetime
from typing import NamedTuple

from lambdascale.core.checks import LARGEST, shown

_TIMESTAMP = re.compile(
    r"(?P<second>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d{1,9}))?(?P<zone>Z|[+-]\d\d:\d\d)?", re.ASCII
)
# Differences of nanoseconds since 1970 fit 64 bits up to the last of these.
YEARS = range(1970, 2262)


class Row(NamedTuple):
    """One request of a trace: ``time`` in ticks of its unit, token counts, and the names of model and session where used.

    ``blocks`` is the number of its hashes. A request that the trace records as failed has no prompt or output tokens.
    """

    time: float
    prompt_tokens: int
    output_tokens: int
    model: str = ""
    session: str = ""
    blocks: int = 0


class BadRow(ValueError):
    """A malformed row; the message names the mistake, the scan adds file and line."""


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


def timestamp_ns(text: str, column: str = "TIMESTAMP") -> int:
    """Nanoseconds since 1970 of ``2023-11-16 18:15:46.6805900``, UTC unless a zone follows; BadRow for anything else."""
    match = _TIMESTAMP.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        whole = datetime.fromisoformat(match["second"] + (match["zone"] or "Z"))
    except ValueError:
        raise BadRow(f"{column} must look like 2023-11-16 18:15:46.6805900, not {shown(text)}") from None
    if whole.year not in YEARS:
        raise BadRow(f"{column} must be from {YEARS[0]} to {YEARS[-1]}, not {shown(text)}")
    return int(whole.timestamp()) * 10**9 + int((match["fraction"] or "0").ljust(9, "0"))
