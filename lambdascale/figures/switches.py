"""Ablations of λScale's parts: the change of each measure when one part is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.core import UserError
from lambdascale.figures.grid import checked, over_seeds
from lambdascale.figures.style import PAGE_IN, log_ticks, looks, say_backend, sizes_in_order

_WHOLE = "lambdascale"


@dataclass(frozen=True, kw_only=True)
class Switches:
    """A figure with a panel per measure; bars are ratios to the whole λScale of the same model and seed.

    ``measures``: (column, title).
    """

    name: str
    measures: Sequence[tuple[str, str]]

    def tidy(self, frame: pd.DataFrame) -> pd.DataFrame:
        """One row per variant, model and seed, measures as ratios. UserError for gaps or without rows of the whole λScale."""
        columns = [column for column, _ in self.measures]
        rows = checked(frame, ["model", "system", "seed"], columns, self.name)
        whole = rows[rows.system == _WHOLE].set_index(["model", "seed"])
        if whole.empty:
            raise UserError(f"{self.name}: no rows of {_WHOLE} to compare with")
        keys = pd.MultiIndex.from_frame(rows[["model", "seed"]])
        ratios = {column: rows[column].to_numpy() / whole[column].reindex(keys).to_numpy() for column in columns}
        return rows.assign(**ratios)[rows.system != _WHOLE].reset_index(drop=True)

    def draw(self, frame: pd.DataFrame) -> Figure:
        """Horizontal bars on a logarithmic axis; the line at 1 is the whole λScale."""
        models, variants = sizes_in_order(frame), list(dict.fromkeys(frame.system))
        height = 0.9 + 0.17 * len(variants) * max(1.4, len(models))
        figure, axes = plt.subplots(
            1, len(self.measures), figsize=(PAGE_IN, height), squeeze=False, layout="constrained", sharey=True
        )
        names = [look.label.partition("(")[2].removesuffix(")") for look in (looks([v])[v] for v in variants)]
        for axis, (column, title) in zip(axes[0], self.measures, strict=True):
            for index, (model, color) in enumerate(zip(models, ("#D55E00", "#0072B2", "#009E73"), strict=False)):
                rows = over_seeds(frame[frame.model == model], ["system"], column).set_index("system").loc[variants]
                width = 0.8 / len(models)
                places = [place + (index - (len(models) - 1) / 2) * width for place in range(len(variants))]
                axis.barh(places, rows["median"] - 1, width * 0.92, left=1, color=color, label=model)
                error = [rows["median"] - rows.low, rows.high - rows["median"]]
                if (rows.high > rows.low).any():
                    axis.errorbar(rows["median"], places, xerr=error, fmt="none", ecolor="0.25", elinewidth=0.7, capsize=1.2)
                for place, value, high in zip(places, rows["median"], rows.high, strict=True):
                    axis.annotate(f"  {value:.2f}", (max(high, 1), place), va="center", fontsize=6)
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set(xlabel=title, yticks=range(len(variants)), yticklabels=names, xscale="log")
            axis.set_xlim(0.98 * min(1.0, frame[column].min()), 1.3 * frame[column].max())
            log_ticks(axis.xaxis)
            axis.grid(visible=False, axis="y")
        axes[0][0].invert_yaxis()
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        say_backend(figure, frame)
        return figure
