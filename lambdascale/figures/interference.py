"""Beyond the paper: ratios to λScale over the slowdown that a multicast causes to those that its members serve."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambdascale.figures.grid import checked
from lambdascale.figures.style import PAGE_IN, looks, say_backend, sizes_in_order

_RATIOS = {"p90_ratio": "P90 TTFT", "longest_ratio": "longest TTFT", "gpu_ratio": "GPU-seconds"}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of runs; ``collective`` is NaN where sources of a broadcast compute nothing. UserError for gaps."""
    checked(frame[frame.collective.isna()], ["model", "one_sided", "system"], list(_RATIOS), "interference")
    return frame[["model", "system", "one_sided", "collective", *_RATIOS, "backend"]]


def draw(frame: pd.DataFrame) -> Figure:
    """A panel per ratio: lines over the slowdown beside one-sided writes, and NCCL's (dashed) over that beside a broadcast."""
    model = sizes_in_order(frame)[0]
    frame = frame[frame.model == model]
    figure, axes = plt.subplots(1, len(_RATIOS), figsize=(PAGE_IN, 2.4), layout="constrained")
    for axis, (column, label) in zip(axes, _RATIOS.items(), strict=True):
        _panel(axis, frame, column)
        axis.set(title=label, xlabel="slowdown of iterations", ylabel="system / λScale")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    say_backend(figure, frame)
    return figure


def _panel(axis: Axes, frame: pd.DataFrame, column: str) -> None:
    for system, look in looks(list(frame.system.unique())).items():
        rows = frame[frame.system == system]
        plain = rows[rows.collective.isna()].sort_values("one_sided")
        axis.plot(plain.one_sided, plain[column], label=look.label, color=look.color, marker=look.marker)
        freed = rows[rows.collective.notna()].sort_values("collective")
        if len(freed):
            label = f"{look.label}, beside broadcasts"
            axis.plot(freed.collective, freed[column], label=label, color=look.color, marker=look.marker, linestyle="--")
    axis.axhline(1.0, color="0.6", linewidth=0.7)
