"""The table of what was tried on a cluster and what went wrong: ``results/tables/reliability.csv``."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path


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


def add_row(row: Row, folder: Path) -> None:
    """Append a row to ``reliability.csv`` in a folder; both are created when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "reliability.csv"
    new = not path.exists()
    cells = asdict(row)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(cells))
        if new:
            writer.writeheader()
        writer.writerow(cells)
