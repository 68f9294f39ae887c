"""Figure 10: time to first token on a trace, over time and as a distribution, by system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambdascale.core import UserError
from lambdascale.figures.style import (
    PAGE_IN,
    looks,
    require_all_systems,
    require_columns,
    require_one_backend,
    say_backend,
    sizes_in_order,
)

REQUIRED = ("model", "system", "arrival_s", "ttft_s", "backend")
_WINDOWS = 60


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per answered request, models in the table's order. UserError if a system answered no request for a model."""
    require_columns(frame, REQUIRED, "fig10_ttft")
    require_one_backend(frame, "fig10_ttft")
    answered = frame.loc[frame.ttft_s.notna(), list(REQUIRED)]
    wanted, found = (set(zip(rows.model, rows.system, strict=True)) for rows in (frame, answered))
    if wanted != found:
        model, system = min(wanted - found)
        raise UserError(f"fig10_ttft: {system} answered no request for {model}")
    require_all_systems(answered, "fig10_ttft")
    return answered


def draw(frame: pd.DataFrame) -> Figure:
    """A row per model: the worst TTFT in each of 60 windows of the trace, and the share of requests that waited longer."""
    models = sizes_in_order(frame)
    figure, axes = plt.subplots(
        len(models), 2, figsize=(PAGE_IN, 2.2 * len(models) + 0.3), squeeze=False, layout="constrained", width_ratios=(3, 2)
    )
    for (over_time, tail), model in zip(axes, models, strict=True):
        rows = frame[frame.model == model]
        for system, look in looks(list(frame.system.unique())).items():
            requests = rows[rows.system == system]
            style = {"color": look.color, "label": look.label, "dashes": look.dashes or (1, 0)}
            _over_time(over_time, requests, rows.arrival_s.max(), style)
            _tail(tail, requests.ttft_s.to_numpy(), style)
        over_time.set(title=model, xlabel="arrival [s]", ylabel="worst TTFT in window [s]", yscale="log")
        tail.set(title=model, xlabel="TTFT [s]", ylabel="share waiting longer", xscale="log", yscale="log")
        tail.axhline(0.1, color="0.6", linewidth=0.6)
        tail.annotate("P90", (1, 0.1), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=6, color="0.4")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))
    say_backend(figure, frame)
    return figure


def _over_time(axis: Axes, requests: pd.DataFrame, end_s: float, style: Mapping[str, Any]) -> None:
    window = max(end_s, 1e-9) / _WINDOWS
    worst = requests.groupby((requests.arrival_s // window).astype(int)).ttft_s.max()
    worst = worst.reindex(range(int(worst.index.max()) + 1))
    axis.plot((worst.index.to_numpy() + 0.5) * window, worst.to_numpy(), linewidth=1.1, **style)


def _tail(axis: Axes, ttft: np.ndarray, style: Mapping[str, Any]) -> None:
    values = np.sort(ttft)
    axis.step(values, 1 - np.arange(len(values)) / len(values), where="post", **style)
