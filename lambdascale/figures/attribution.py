"""Attribution: TTFT and GPU time from FaaSNet with one source to λScale, one part at a time, on each trace."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambdascale.core import UserError
from lambdascale.figures.grid import checked, over_seeds
from lambdascale.figures.style import LOOKS, PAGE_IN, say_backend, sizes_in_order

# The steps with their titles, each of which adds one part; the last two are alternatives.
_STEPS = {
    "faasnet_one_source": "FaaSNet, one source",
    "k_sources": "+ k sources",
    "binomial": "+ binomial pipeline",
    "pipelines": "+ execution pipelines",
    "host_sources": "+ host copies as sources",
    "eager": "+ eager data plane",
    "lambdascale_tuned": "+ rules of lambdascale_tuned",
    "lambdascale": "or: the paper's rules",
}
_MEASURES = (("ttft_p90_s", "P90 TTFT [s]"), ("gpu_seconds", "GPU time [s]"))
# End of the name of a trace's class -> its title.
_TRACES = {"ArrivalsTrace": "authors' trace", "AzureTrace": "Azure's trace"}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per trace, model, step and seed. UserError for gaps, for steps that are missing or unknown, and unknown traces."""
    rows = checked(frame, ["trace", "model", "system", "seed"], [column for column, _ in _MEASURES], "attribution")
    if unknown := sorted(set(rows.system) ^ set(_STEPS)):
        raise UserError(f"attribution: the table must have the steps {', '.join(_STEPS)}; {', '.join(unknown)} differ")
    traces = rows.trace.str.rpartition(".")[2]
    if unknown := sorted(set(traces) - set(_TRACES)):
        raise UserError(f"attribution: traces are {', '.join(_TRACES)}, not {', '.join(unknown)}")
    return rows.assign(trace=traces.map(_TRACES))


def draw(frame: pd.DataFrame) -> Figure:
    """A row of panels per trace and measure, a panel per model: bars with their values, λScale's marked by colour."""
    models = sizes_in_order(frame)
    lines = [(trace, *measure) for trace in dict.fromkeys(frame.trace) for measure in _MEASURES]
    size = (PAGE_IN, 1.9 * len(lines) + 0.2)
    figure, axes = plt.subplots(len(lines), len(models), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for row, (trace, column, title) in zip(axes, lines, strict=True):
        for axis, model in zip(row, models, strict=True):
            _bars(axis, frame[(frame.trace == trace) & (frame.model == model)], column)
            axis.set(title=f"{model}, {trace}", xlabel=title)
    axes[0][0].invert_yaxis()
    say_backend(figure, frame)
    return figure


def _bars(axis: Axes, frame: pd.DataFrame, column: str) -> None:
    rows = over_seeds(frame, ["system"], column).set_index("system").loc[list(_STEPS)]
    colors = [LOOKS["lambdascale" if name.startswith("lambdascale") else "faasnet"].color for name in _STEPS]
    axis.barh(range(len(rows)), rows["median"], 0.7, color=colors)
    for place, value in enumerate(rows["median"]):
        axis.annotate(f"  {value:.3g}" if value < 100 else f"  {value:.0f}", (value, place), va="center", fontsize=6)
    axis.set(yticks=range(len(rows)), yticklabels=list(_STEPS.values()))
    axis.set_xlim(0, 1.18 * rows["median"].max())
    axis.grid(visible=False, axis="y")
