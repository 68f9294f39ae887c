"""Ablation: block order and chunks of k-way transmission."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.figures.bars import BarLook, grouped_bars
from lambdascale.figures.grid import checked
from lambdascale.figures.style import PAGE_IN, say_backend, sizes_in_order

_LOOKS = {
    "contiguous": BarLook("contiguous chunks", "#D55E00"),
    "round_robin": BarLook("chunks dealt round-robin", "#56B4E9", "//"),
}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run; UserError for gaps in the table."""
    return checked(frame, ["model", "order", "chunks"], ["ttft_p50_s", "ttft_max_s"], "ablation_order")


def draw(frame: pd.DataFrame) -> Figure:
    """A panel per model: the time until the last request of the burst has its first token."""
    models, orders = sizes_in_order(frame), list(dict.fromkeys(frame.order))
    figure, axes = plt.subplots(1, len(models), figsize=(PAGE_IN, 2.2), squeeze=False, layout="constrained")
    shown = {name: look for name, look in _LOOKS.items() if name in set(frame.chunks)}
    for axis, model in zip(axes[0], models, strict=True):
        grouped_bars(
            axis, frame[frame.model == model], groups="order", series="chunks", value="ttft_max_s", order=orders, looks=shown
        )
        axis.set(title=model, xlabel="block order", ylim=(0, None))
    axes[0][0].set_ylabel("until all are served [s]")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    say_backend(figure, frame)
    return figure
