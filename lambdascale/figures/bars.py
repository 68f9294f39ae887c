"""Grouped bars: medians over seeds, ranges as thin lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes

from lambdascale.figures.grid import over_seeds


@dataclass(frozen=True)
class BarLook:
    """Label, colour and hatch of one series of bars."""

    label: str
    color: str
    hatch: str = ""


def grouped_bars(
    axis: Axes, frame: pd.DataFrame, *, groups: str, series: str, value: str, order: Sequence[str], looks: dict[str, BarLook]
) -> None:
    """Draw a group of bars per value of ``groups`` (in ``order``), with one bar per value of ``series`` that has a look."""
    names = list(looks)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = over_seeds(frame[frame[series] == name], [groups], value).set_index(groups).loc[list(order)]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(order))]
        error = [rows["median"] - rows.low, rows.high - rows["median"]]
        look = looks[name]
        axis.bar(
            places,
            rows["median"],
            width * 0.92,
            label=look.label,
            color=look.color,
            hatch=look.hatch,
            edgecolor="white",
            linewidth=0.3,
        )
        if (rows.high > rows.low).any():
            axis.errorbar(places, rows["median"], yerr=error, fmt="none", ecolor="0.25", elinewidth=0.7, capsize=1.2)
    axis.set(xticks=range(len(order)), xticklabels=list(order))
    axis.grid(visible=False, axis="x")
