"""Figure 9: λScale's ramp-up and TTFT with 1, 2 and 4 sources, in GPU or in host memory."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambdascale.figures.grid import checked
from lambdascale.figures.rampup import token_rate
from lambdascale.figures.style import PAGE_IN, say_backend, sizes_in_order

_COLORS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#000000")
_DASHES = ((4, 1.2), (2, 1), (1, 0), (4, 1.2, 1, 1.2), (1, 1.2))
_POINTS = 70


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per request with ``tier``, where the sources hold the model, and ``k``, their number. UserError for gaps."""
    values = ["gpu_sources", "host_sources", "first_token_s", "finished_s", "output_tokens", "arrival_s"]
    checked(frame, ["model"], values, "fig09_sources")
    in_gpu = frame.gpu_sources > 0
    named = frame.assign(tier=np.where(in_gpu, "GPU", "host"), k=np.where(in_gpu, frame.gpu_sources, frame.host_sources))
    rows = checked(named, ["model", "tier", "k"], values, "fig09_sources")
    return rows.assign(ttft_s=rows.first_token_s - rows.arrival_s)


def draw(frame: pd.DataFrame) -> Figure:
    """A row per tier: tokens per second over time for each model, and TTFT as boxes."""
    models, sources = sizes_in_order(frame), sorted(frame.k.unique())
    tiers = list(dict.fromkeys(frame.tier))
    figure, axes = plt.subplots(
        len(tiers), len(models) + 1, figsize=(PAGE_IN, 2.0 * len(tiers) + 0.2), squeeze=False, layout="constrained"
    )
    for line, tier in zip(axes, tiers, strict=True):
        rows = frame[frame.tier == tier]
        for axis, model in zip(line, models, strict=False):
            part = rows[rows.model == model]
            grid = np.linspace(0.0, part.first_token_s.max() * 1.35, _POINTS + 1)
            for index, k in enumerate(sources):
                rate = token_rate(part[part.k == k], grid)
                style = {"color": _COLORS[index % 5], "dashes": _DASHES[index % 5]}
                axis.plot((grid[1:] + grid[:-1]) / 2, rate, label=f"k = {k}", **style)
            axis.set(title=f"{model}, sources in {tier} memory", xlabel="time since the burst [s]", ylim=(0, None))
        line[0].set_ylabel("tokens / s")
        _boxes(line[-1], rows, models, sources)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    say_backend(figure, frame)
    return figure


def _boxes(axis: Axes, rows: pd.DataFrame, models: list[str], sources: list[int]) -> None:
    """TTFT of each k: box from quartile to quartile, whiskers from first to last request."""
    for index, k in enumerate(sources):
        data = [rows[(rows.model == model) & (rows.k == k)].ttft_s.to_numpy() for model in models]
        places = [place + (index - (len(sources) - 1) / 2) * 0.25 for place in range(len(models))]
        boxes = axis.boxplot(data, positions=places, widths=0.18, whis=(0, 100), patch_artist=True, manage_ticks=False)
        for box in boxes["boxes"]:
            box.set(facecolor=_COLORS[index % 5], alpha=0.6, linewidth=0.6)
        for middle in boxes["medians"]:
            middle.set(color="black", linewidth=1.0)
    axis.set(title="TTFT", ylabel="TTFT [s]", ylim=(0, None), xticks=range(len(models)), xticklabels=models)
