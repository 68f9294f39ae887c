"""Beyond the paper: percentiles of the gaps between tokens, and the longest stall, by system."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.figures.bars import BarLook, grouped_bars
from lambdascale.figures.grid import checked
from lambdascale.figures.style import PAGE_IN, log_ticks, looks, say_backend, sizes_in_order

_LEVELS = {"itl_p50_s": "P50", "itl_p90_s": "P90", "itl_p99_s": "P99", "itl_p999_s": "P99.9", "itl_max_s": "longest"}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run and level: ``level``, ``gap_s``. UserError for gaps in the table, and for runs without token times."""
    wide = checked(frame, ["model", "system"], [*_LEVELS, "seed"], "token_gaps")
    long = wide.melt(["model", "system", "seed", "backend"], list(_LEVELS), "level", "gap_s")
    return long.assign(level=long.level.map(_LEVELS))


def draw(frame: pd.DataFrame) -> Figure:
    """Bars of gaps in seconds, logarithmic: a group per level, a bar per system."""
    model = sizes_in_order(frame)[0]
    frame = frame[frame.model == model]
    figure, axis = plt.subplots(figsize=(PAGE_IN * 0.8, 2.4), layout="constrained")
    systems = {name: BarLook(look.label, look.color) for name, look in looks(list(frame.system.unique())).items()}
    grouped_bars(axis, frame, groups="level", series="system", value="gap_s", order=list(_LEVELS.values()), looks=systems)
    axis.set_yscale("log")
    log_ticks(axis.yaxis)
    axis.set(title=f"{model}: gaps between tokens", ylabel="gap [s]", xlabel="of all gaps of a run")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    say_backend(figure, frame)
    return figure
