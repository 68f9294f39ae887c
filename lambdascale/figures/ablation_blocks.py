"""Ablation: the number of blocks a model is divided into."""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from lambdascale.figures.grid import checked
from lambdascale.figures.style import PAGE_IN, require_columns, say_backend, sizes_in_order

_COLORS = {False: "#D55E00", True: "#0072B2"}
_ENOUGH = 1.1
_RING: dict[str, Any] = {"marker": "o", "markersize": 9, "fillstyle": "none", "color": "black", "linewidth": 0}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run. Each model has its own numbers of blocks, so completeness is checked per model; UserError for gaps.

    Live runs leave ``barrier`` empty, since a live cluster has no barrier.
    """
    require_columns(frame, ["model", "barrier"], "ablation_blocks")
    frame = frame.assign(barrier=frame.barrier.eq(True))
    parts = [
        checked(part, ["model", "sources", "barrier", "blocks"], ["all_nodes_s", "ttft_max_s"], "ablation_blocks")
        for _, part in frame.groupby("model", sort=False)
    ]
    return pd.concat(parts, ignore_index=True)


def draw(frame: pd.DataFrame) -> Figure:
    """A column per model: time to all nodes, and time until all requests are served; a ring marks the elbow.

    The elbow is the smallest number of blocks whose time is within 10 % of the best.
    """
    models = sizes_in_order(frame)
    figure, axes = plt.subplots(2, len(models), figsize=(PAGE_IN, 3.7), squeeze=False, layout="constrained", sharex="col")
    for column, model in zip(axes.T, models, strict=True):
        rows = frame[frame.model == model]
        for axis, value in zip(column, ("all_nodes_s", "ttft_max_s"), strict=True):
            _lines(axis, rows, value)
        column[0].set_title(model)
        column[1].set_xlabel("blocks")
    axes[0][0].set_ylabel("time to all nodes [s]")
    axes[1][0].set_ylabel("until all are served [s]")
    handles, _ = axes[0][0].get_legend_handles_labels()
    handles.append(Line2D([], [], label=f"fewest within {_ENOUGH - 1:.0%} of the best", **_RING))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    say_backend(figure, frame)
    return figure


def _lines(axis: Axes, rows: pd.DataFrame, value: str) -> None:
    for key, part in rows.groupby(["sources", "barrier"], sort=True):
        sources, barrier = cast(tuple[int, bool], key)
        line = part.sort_values("blocks")
        few = sources == rows.sources.min()
        marker = "o" if few else "s"
        label = f"{sources} source{'s' if sources > 1 else ''}, {'barrier' if barrier else 'eager'}"
        color = _COLORS[bool(barrier)]
        axis.plot(line.blocks, line[value], color=color, marker=marker, dashes=(1, 0) if few else (3, 1.2), label=label)
        elbow = line[line[value] <= _ENOUGH * line[value].min()].iloc[0]
        axis.plot(elbow.blocks, elbow[value], **_RING)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(sorted(rows.blocks.unique())))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_ylim(0, 1.08 * rows[value].max())
