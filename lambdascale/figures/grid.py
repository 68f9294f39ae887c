"""Pure functions between tables and figures: completeness of a grid, medians over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pandas as pd

from lambdascale.core import UserError
from lambdascale.figures.style import require_columns, require_one_backend

NEVER = "never"


def require_grid(frame: pd.DataFrame, keys: Sequence[str], figure: str) -> None:
    """Raise UserError unless every combination of the values of ``keys`` in the table has rows."""
    found = set(frame[list(keys)].itertuples(index=False, name=None))
    for wanted in product(*(frame[key].unique() for key in keys)):
        if wanted not in found:
            raise UserError(f"{figure}: no rows for {', '.join(str(value) for value in wanted)}")


def checked(
    frame: pd.DataFrame, keys: Sequence[str], values: Sequence[str], figure: str, *, complete: bool = True
) -> pd.DataFrame:
    """Return the columns a figure needs; UserError for missing columns or values, for mixed backends, and, if the table is to be
    ``complete``, for missing combinations of ``keys``.
    """
    needed = [*keys, *values, "backend"]
    require_columns(frame, needed, figure)
    if "system" in keys:
        require_one_backend(frame, figure)
    elif len(set(frame.backend)) > 1:
        raise UserError(f"{figure}: the table has rows of several backends; filter it first")
    if complete:
        require_grid(frame, keys, figure)
    bad = frame[frame[list(values)].isna().any(axis=1)]
    if len(bad):
        raise UserError(f"{figure}: no value for {', '.join(str(bad.iloc[0][key]) for key in keys)}")
    return frame.loc[:, needed]


def over_seeds(frame: pd.DataFrame, keys: Sequence[str], value: str) -> pd.DataFrame:
    """One row per combination of ``keys``, in table order: ``median``, ``low`` (smallest), ``high`` (largest) of ``value``."""
    grouped = frame.groupby(list(keys), sort=False, dropna=False)[value]
    return grouped.agg(median="median", low="min", high="max").reset_index()
