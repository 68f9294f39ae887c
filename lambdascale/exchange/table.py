"""A CSV file with a row per request: the columns of requests.parquet, ``backend``, and gaps between tokens joined by spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lambdascale.core import UserError
from lambdascale.exchange.results import Results, tidy

_NEEDED = ("request_id", "arrival_s", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "e2e_s", "status")


def text(results: Results) -> str:
    """The table, in the order of requests."""
    frame = results.requests.assign(
        itl_s=["" if gaps is None else " ".join(map(repr, gaps)) for gaps in results.requests.itl_s],
        system=results.system,
        backend=results.backend,
    )
    return str(frame.to_csv(index=False))


def read(path: Path) -> Results:
    """Read a table that ``text`` wrote; UserError for anything else."""
    try:
        frame = pd.read_csv(path, dtype={"itl_s": str, "failure_reason": str, "failure": str, "model": str})
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if missing := [name for name in _NEEDED if name not in frame]:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}")
    labels = {name: str(frame[name].iloc[0]) if name in frame and len(frame) else "unknown" for name in ("backend", "system")}
    try:
        rows = [{str(key): value for key, value in row.items()} | {"itl_s": _gaps(row)} for row in frame.to_dict("records")]
        tidied = tidy(rows)
    except ValueError as error:
        raise UserError(f"{path}: an entry is no number: {error}") from error
    return Results(requests=tidied, backend=labels["backend"], system=labels["system"])


def _gaps(row: dict[Any, Any]) -> list[float] | None:
    """Gaps of a row; None if it has none."""
    written = row.get("itl_s")
    return [float(gap) for gap in written.split()] if isinstance(written, str) else None
