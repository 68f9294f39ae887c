"""Figure 2: share of loads that miss host memory, and lifetime of host copies, against the keep-alive time."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.figures.grid import NEVER, checked, over_seeds
from lambdascale.figures.style import PAGE_IN, say_backend

_TRACES = {"ArrivalsTrace": ("λScale authors' trace", "#D55E00", "o"), "AzureTrace": ("Azure conversation", "#0072B2", "s")}
_OTHER = ("", "#009E73", "^")


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run with the share of loads from SSD; ``keep_alive`` as text, in the table's order. UserError for gaps."""
    named = frame.assign(keep_alive=[NEVER if pd.isna(s) else f"{s:g}" for s in frame.get("keep_alive_s", [])])
    values = ["loads_host", "loads_ssd", "lifetime_p50_s", "lives_within_15s"]
    rows = checked(named, ["trace", "keep_alive"], values, "fig02_host_cache")
    return rows.assign(
        ssd_percent=100 * rows.loads_ssd / (rows.loads_ssd + rows.loads_host), short_percent=100 * rows.lives_within_15s
    )


def draw(frame: pd.DataFrame) -> Figure:
    """Loads from SSD, copies that live at most 15 s, and median lifetimes; medians over seeds, ranges as bars."""
    figure, axes = plt.subplots(1, 3, figsize=(PAGE_IN, 2.3), layout="constrained")
    settings = list(dict.fromkeys(frame.keep_alive))
    measures = [
        ("ssd_percent", "loads from SSD [%]"),
        ("short_percent", "copies that live ≤ 15 s [%]"),
        ("lifetime_p50_s", "median life of a copy [s]"),
    ]
    for axis, (column, label) in zip(axes, measures, strict=True):
        for trace in dict.fromkeys(frame.trace):
            name = str(trace).rsplit(".", 1)[-1]
            title, color, marker = _TRACES.get(name, _OTHER)
            line = over_seeds(frame[frame.trace == trace], ["keep_alive"], column)
            error = [line["median"] - line.low, line.high - line["median"]]
            axis.errorbar(
                range(len(line)), line["median"], yerr=error, color=color, marker=marker, label=title or name, capsize=2
            )
        axis.set(xlabel="keep-alive in host memory [s]", ylabel=label, xticks=range(len(settings)), xticklabels=settings)
        axis.set_ylim(0, None if column == "lifetime_p50_s" else 105)
    axes[2].set_yscale("log")
    axes[2].set_ylim(1, None)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    say_backend(figure, frame)
    return figure
