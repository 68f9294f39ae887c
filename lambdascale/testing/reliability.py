"""The table of what was tried on a cluster and what went wrong: ``results/tables/reliability.csv``."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path

from lambdascale.core import UserError

_TABLE = "reliability.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial. ``requests`` that clients made in it, and how many of them were lost, answered twice, or answered wrongly.

    They are None where a trial has none; ``wrong`` then counts whatever should not have happened.
    """

    what: str
    tried: str
    requests: int | None = None
    lost: int | None = None
    doubled: int | None = None
    wrong: int
    detail: str
    command: str


def check_writable(folder: Path) -> None:
    """Create a folder when it is missing; UserError if no row could be added in it, before a trial takes its time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _TABLE).open("a"):
            pass
    except OSError as error:
        raise UserError(f"cannot write {folder / _TABLE}: {error.strerror or error}") from error


def add_row(row: Row, folder: Path) -> None:
    """Append a row to ``reliability.csv`` in a folder; both are created when missing. UserError if that fails."""
    check_writable(folder)
    path = folder / _TABLE
    new = not path.stat().st_size
    cells = asdict(row)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(cells))
        if new:
            writer.writeheader()
        writer.writerow(cells)
