"""Figure 1: burstiness of traces, as requests in windows of 10 s. Arrivals are data: nothing here is simulated."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.figures.grid import checked
from lambdascale.figures.style import PAGE_IN

_TITLES = {
    "ArrivalsTrace": "λScale authors' trace",
    "RateSeriesWorkload": "BurstGPT rates, 2 hours",
    "AzureTrace": "Azure conversation",
    "BurstyWorkload": "our generator",
}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per window; ``trace`` names the class that read or generated it. UserError for gaps in the table."""
    rows = checked(frame, ["trace"], ["at_s", "requests"], "fig01_burstiness")
    return rows.assign(trace=[str(name).rsplit(".", 1)[-1] for name in rows.trace])


def draw(frame: pd.DataFrame) -> Figure:
    """A panel per trace, with its burstiness: variance over mean of the counts (1 for Poisson), highest over mean."""
    traces = list(dict.fromkeys(frame.trace))
    lines = -(-len(traces) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(PAGE_IN, 1.6 * lines + 0.2), squeeze=False, layout="constrained")
    for axis in axes.flat[len(traces) :]:
        axis.remove()
    for axis, trace in zip(axes.flat, traces, strict=False):
        rows = frame[frame.trace == trace]
        axis.fill_between(rows.at_s / 60, rows.requests, step="post", color="#0072B2", alpha=0.85, linewidth=0)
        fano, peak = rows.requests.var(ddof=0) / rows.requests.mean(), rows.requests.max() / rows.requests.mean()
        axis.set(
            title=_TITLES.get(trace, trace), xlabel="time [min]", ylabel="requests in 10 s", ylim=(0, rows.requests.max() * 1.3)
        )
        note = f"variance/mean {fano:.1f}, peak/mean {peak:.1f}"
        axis.annotate(note, (0.99, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=7)
    return figure
