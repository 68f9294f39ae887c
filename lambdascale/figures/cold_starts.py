"""Whole cold starts: the parts of the mean TTFT by system, with warm processes and with new ones."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambdascale.core import UserError
from lambdascale.figures.grid import checked
from lambdascale.figures.style import PAGE_IN, looks, say_backend, sizes_in_order

# Part -> its title and colour, from the arrival on.
_PARTS = {
    "queue": ("queue", "#999999"),
    "source_wait": ("source wait", "#E69F00"),
    "setup": ("set-up", "#CC79A7"),
    "transfer": ("transfer", "#0072B2"),
    "first_iteration": ("first iteration", "#009E73"),
}
_POOLS = {"WarmPool": "warm processes", "NewProcesses": "new processes"}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per model, pool and system: the means over seeds of the parts' means, in seconds, which add up.

    UserError for gaps in the table, and for unknown pools.
    """
    values = [f"{part}_mean_s" for part in _PARTS]
    rows = frame.assign(pool=[_title(pool, kept_s) for pool, kept_s in zip(frame.pool, frame.kept_s, strict=True)])
    rows = checked(rows, ["model", "pool", "system"], values, "cold_starts")
    return rows.groupby(["model", "pool", "system", "backend"], sort=False)[values].mean().reset_index()


def _title(pool: str, kept_s: float) -> str:
    name = pool.rpartition(".")[2]
    if name not in _POOLS:
        raise UserError(f"cold_starts: pools are {', '.join(_POOLS)}, not {name}")
    return f"{_POOLS[name]}, kept for {kept_s:g} s" if kept_s > 0 else _POOLS[name]


def draw(frame: pd.DataFrame) -> Figure:
    """Draw a row of panels per model, a panel per pool: a bar per system, its parts one upon the other."""
    models, pools = sizes_in_order(frame), list(dict.fromkeys(frame.pool))
    size = (PAGE_IN, 1.9 * len(models) + 0.4)
    figure, axes = plt.subplots(len(models), len(pools), figsize=size, squeeze=False, layout="constrained")
    for row, model in zip(axes, models, strict=True):
        for axis, pool in zip(row, pools, strict=True):
            _bars(axis, frame[(frame.model == model) & (frame.pool == pool)])
            axis.set(title=f"{model}\n{pool}")
        row[0].set(ylabel="mean TTFT [s]")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    say_backend(figure, frame)
    return figure


def _bars(axis: Axes, frame: pd.DataFrame) -> None:
    systems = looks(list(frame.system.unique()))
    rows = frame.set_index("system").loc[list(systems)]
    below = pd.Series(0.0, index=rows.index)
    for part, (title, color) in _PARTS.items():
        height = rows[f"{part}_mean_s"]
        axis.bar(range(len(rows)), height, 0.7, bottom=below, label=title, color=color, edgecolor="white", linewidth=0.3)
        below = below + height
    axis.set_xticks(range(len(rows)), [""] * len(rows))
    for place, look in enumerate(systems.values()):  # as texts, which marks can be added to
        axis.text(place, -0.04, look.label, fontsize=7, rotation=30, ha="right", va="top", transform=axis.get_xaxis_transform())
    axis.grid(visible=False, axis="x")
