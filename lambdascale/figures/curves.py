"""Figures that are curves per system: a measure over a setting, medians over seeds with the range shaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from lambdascale.figures.grid import checked, over_seeds
from lambdascale.figures.style import PAGE_IN, log_ticks, looks, say_backend, sizes_in_order


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A figure of curves. ``measures``: (column, label of the axis).

    One measure gives a panel per model, several give a panel each for the first model. ``number`` turns values of ``x`` into
    numbers.
    """

    name: str
    x: str
    x_label: str
    measures: Sequence[tuple[str, str]]
    log_x: bool = False
    log_y: bool = False
    number: Callable[[object], float] | None = None

    def tidy(self, frame: pd.DataFrame) -> pd.DataFrame:
        """One row per run. UserError for gaps in the table."""
        tidy = checked(frame, ["model", "system", self.x], [column for column, _ in self.measures], self.name)
        return tidy if self.number is None else tidy.assign(**{self.x: tidy[self.x].map(self.number)})

    def draw(self, frame: pd.DataFrame) -> Figure:
        """Panels side by side, with one legend above them."""
        models = sizes_in_order(frame)
        panels = (
            [(model, *self.measures[0]) for model in models]
            if len(self.measures) == 1
            else [(models[0], *measure) for measure in self.measures]
        )
        width = PAGE_IN if len(panels) > 1 else PAGE_IN * 0.62
        figure, axes = plt.subplots(1, len(panels), figsize=(width, 2.4), squeeze=False, layout="constrained")
        for axis, (model, column, label) in zip(axes[0], panels, strict=True):
            self._panel(axis, frame[frame.model == model], list(frame.system.unique()), column)
            title = model if len(panels) == len(models) or len(models) == 1 else ""
            axis.set(title=title, xlabel=self.x_label, ylabel=label)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(6 if len(panels) > 1 else 3, len(labels)))
        say_backend(figure, frame)
        return figure

    def _panel(self, axis: Axes, rows: pd.DataFrame, systems: Sequence[str], column: str) -> None:
        for system, look in looks(systems).items():
            line = over_seeds(rows[rows.system == system], [self.x], column).sort_values(self.x)
            style: dict[str, Any] = {"color": look.color, "marker": look.marker, "dashes": look.dashes or (1, 0)}
            axis.plot(line[self.x], line["median"], label=look.label, **style)
            axis.fill_between(line[self.x], line.low, line.high, color=look.color, alpha=0.15, linewidth=0)
        if self.log_y:
            axis.set_yscale("log")
            log_ticks(axis.yaxis)
        else:
            axis.set_ylim(0, None)
        if self.log_x:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_locator(FixedLocator(sorted(rows[self.x].unique())))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(ScalarFormatter())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
