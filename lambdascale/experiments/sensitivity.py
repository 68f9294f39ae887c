"""Conclusions under other assumptions: what of «λScale over X» and «GPU time below X» holds, from the table of the study.

A row's ``run`` is sensitivity/SETTING/VALUE; sensitivity/base/0 has the defaults.
Frames in, frames out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from lambdascale.core import UserError
from lambdascale.experiments.paper_table import NAMES

BASE = "base"
# Published range of P90 TTFT over λScale (reference, section 3).
_PAPER = (2.4, 5.0)
_MEASURES = {"p90": "P90 TTFT, {} over λScale", "gpu": "GPU time below {}"}
_COLUMNS = [
    "conclusion",
    "model",
    "setting",
    "value",
    "base",
    "base_interval",
    "result",
    "interval",
    "verdict",
    "paper",
    "backend",
]


def settings_of(table: pd.DataFrame) -> pd.DataFrame:
    """The table with columns ``setting`` and ``value``, parts of ``run``; UserError for another form, or without base rows."""
    parts = table.run.str.split("/", n=2, expand=True)
    if parts.shape[1] != 3 or parts.isna().any(axis=None):
        raise UserError("sensitivity: every run must be named sensitivity/SETTING/VALUE")
    if not (parts[1] == BASE).any():
        raise UserError(f"sensitivity: no rows of {BASE} to compare with")
    return table.assign(setting=parts[1], value=parts[2])


def conclusions(table: pd.DataFrame) -> pd.DataFrame:
    """One row per conclusion, model, setting and value: the result beside that of the defaults, and the conclusion's fate.

    ``base``, ``result``: a ratio for P90 TTFT, per cent saved for GPU time, each with its interval of 95 %. ``verdict``: holds;
    halved (less than half the gain is left); undecided (the interval includes no difference); reversed. ``paper``: place of the
    ratio below, in or above the published range.
    """
    return pd.DataFrame(_rows(settings_of(table)), columns=_COLUMNS)


def _rows(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for measure, title in _MEASURES.items():
        for (system, model), rows in table.groupby(["system", "model"], sort=False):
            bases = rows[rows.setting == BASE]
            if bases.empty:
                raise UserError(f"sensitivity: no row of {BASE} for {system}, {model}")
            base, base_low, base_high = _result(bases.iloc[0], measure)
            for row in rows[rows.setting != BASE].to_dict("records"):
                value, low, high = _result(row, measure)
                yield {
                    "conclusion": title.format(NAMES.get(str(system), str(system))),
                    "model": model,
                    "setting": row["setting"],
                    "value": row["value"],
                    "base": base,
                    "base_interval": _span(base_low, base_high),
                    "result": value,
                    "interval": _span(low, high),
                    "verdict": verdict(base, value, low, high, none=1.0 if measure == "p90" else 0.0),
                    "paper": _place(value) if measure == "p90" else "",
                    "backend": row["backend"],
                }


def _result(row: Any, measure: str) -> tuple[float, float, float]:
    """Result of a row with its interval: the ratio, or the per cent of theirs that λScale saves."""
    ratios = [float(row[f"{measure}_{part}"]) for part in ("ratio", "low", "high")]
    value, low, high = ratios if measure == "p90" else [100 * (1 - 1 / ratio) for ratio in ratios]
    return value, low, high


def verdict(base: float, value: float, low: float, high: float, *, none: float) -> str:
    """Fate of a conclusion that held with ``base``: ``none`` is the value of no difference; without an interval value decides."""
    gain, before = value - none, base - none
    if gain * before <= 0 or math.isnan(gain):
        certain = not math.isnan(low) and not low <= none <= high
        return "reversed" if certain else "undecided"
    if not math.isnan(low) and low <= none <= high:
        return "undecided"
    return "halved" if abs(gain) < abs(before) / 2 else "holds"


def _span(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:.3g} to {high:.3g}"


def _place(ratio: float) -> str:
    return "below" if ratio < _PAPER[0] else "above" if ratio > _PAPER[1] else "in"


def flips(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`conclusions` whose conclusion did not simply hold, or whose place in the published range changed."""
    rows = conclusions(table)
    before = [_place(base) if paper else "" for base, paper in zip(rows.base, rows.paper, strict=True)]
    moved = rows.paper != before
    paper = [f"{old} to {new}" if old != new else "" for old, new in zip(before, rows.paper, strict=True)]
    return rows.assign(paper=paper)[(rows.verdict != "holds") | moved].reset_index(drop=True)


def markdown(table: pd.DataFrame) -> str:
    """A row per conclusion and model: result with the defaults, smallest and largest with their settings, and what flips it.

    Results have their intervals of 95 % in brackets.
    """
    rows = conclusions(table)
    lines = ["| conclusion | model | defaults | smallest | largest | does not hold at | less than half the gain at |"]
    lines.append("|" + "---|" * 7)
    for (conclusion, model), part in rows.groupby(["conclusion", "model"], sort=False):
        unit = " x" if "P90" in str(conclusion) else " %"
        ordered = list(part.sort_values("result", kind="stable").itertuples())
        least, most = ordered[0], ordered[-1]
        base = _bracketed(least.base, unit, least.base_interval)
        ends = [f"{_bracketed(row.result, unit, row.interval)}: {_where(row)}" for row in (least, most)]
        lost = [_where(row) + ("" if row.verdict == "undecided" else " (reversed)") for row in _of(part, "undecided", "reversed")]
        half = [_where(row) for row in _of(part, "halved")]
        cells = [conclusion, model, base, *ends, "; ".join(lost) or "none", "; ".join(half) or "none"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _bracketed(value: Any, unit: str, interval: Any) -> str:
    return f"{value:.3g}{unit} ({interval})" if interval else f"{value:.3g}{unit}"


def _of(rows: pd.DataFrame, *verdicts: str) -> list[Any]:
    return list(rows[rows.verdict.isin(verdicts)].itertuples())


def _where(row: Any) -> str:
    return f"{str(row.setting).replace('_', ' ')} = {row.value}"
