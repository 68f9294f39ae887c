"""Results of requests between formats: one frame with the columns that all of them know, and what describes the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lambdascale.core import UserError

# Columns of requests.parquet that every format carries; times in seconds.
COLUMNS = (
    "request_id",
    "model",
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "itl_s",
    "status",
    "failure_reason",
    "failure",
)
_NUMBERS = ("arrival_s", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "e2e_s")


@dataclass(frozen=True, kw_only=True)
class Results:
    """One row per request: ``COLUMNS`` at least, absent values None, ``itl_s`` the list of gaps between tokens where it is known.

    ``backend``: sim, live, live-paced or live-timed, or the harness that measured. ``goodput_per_s``: requests within their
    objectives per second, None without objectives.
    """

    requests: pd.DataFrame
    backend: str
    system: str
    goodput_per_s: float | None = None

    @property
    def completed(self) -> pd.DataFrame:
        """Rows of requests that were answered."""
        return self.requests[self.requests.status == "ok"]

    @property
    def has_gaps(self) -> bool:
        """True if the gaps between tokens of all answers are known."""
        ok = self.completed
        return not any(gaps is None and tokens > 1 for gaps, tokens in zip(ok.itl_s, ok.output_tokens, strict=True))

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last end of a request; 0 without an answer."""
        ok = self.completed
        return float((ok.arrival_s + ok.e2e_s).max() - self.requests.arrival_s.min()) if len(ok) else 0.0


def results_of(requests: pd.DataFrame, summary: Mapping[str, Any]) -> Results:
    """Results of a run: its requests.parquet and summary.json."""
    slo = summary.get("slo") or {}
    return Results(
        requests=tidy([{str(key): value for key, value in row.items()} for row in requests.to_dict("records")]),
        backend=str(summary["backend"]),
        system=str(summary["system"]),
        goodput_per_s=slo.get("goodput_requests_per_s"),
    )


def tidy(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Frame of rows that may lack columns, and have more: numbers as floats, other absent values None."""
    frame = pd.DataFrame(list(rows))
    frame = frame.reindex(columns=list(dict.fromkeys((*COLUMNS, *frame.columns))))
    for name in _NUMBERS:
        frame[name] = pd.to_numeric(frame[name], errors="raise").astype("float64")
    for name in ("model", "failure_reason", "failure", "itl_s"):
        frame[name] = pd.Series([_present(value) for value in frame[name]], index=frame.index, dtype=object)
    return frame


def _present(value: Any) -> Any:
    if isinstance(value, list | tuple | np.ndarray):
        return [float(each) for each in value]
    return None if value is None or value != value else value


def mean_gap_s(ttft_s: float, e2e_s: float, tokens: float) -> float | None:
    """TPOT: seconds per token after the first; None for an answer of one token."""
    return (e2e_s - ttft_s) / (tokens - 1) if tokens > 1 else None


def read_text(path: Path) -> str:
    """Text of a file (UTF-8); UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
