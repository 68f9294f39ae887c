"""Beyond the paper: attainment of service-level objectives over the offered load, and the load served at 99 and 95 %.

A load is a multiple of the trace's rate. One row of panels for each size of batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from lambdascale.figures.bars import BarLook, grouped_bars
from lambdascale.figures.grid import checked, over_seeds
from lambdascale.figures.style import PAGE_IN, looks, say_backend, sizes_in_order

_LEVELS = (99.0, 95.0)


def load_at(loads: Sequence[float], attained: Sequence[float], percent: float) -> float:
    """Return the highest load, on the line between measured ones, that is served at ``percent``.

    ``loads``, ascending, with what each attained in per cent. 0 if none attained it; the last load if that did.
    """
    served = [index for index, value in enumerate(attained) if value >= percent]
    if not served:
        return 0.0
    last = served[-1]
    if last == len(loads) - 1:
        return loads[last]
    share = (attained[last] - percent) / (attained[last] - attained[last + 1])
    return loads[last] + share * (loads[last + 1] - loads[last])


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run. UserError for gaps in the table, and for several models or objectives."""
    tidy = checked(frame, ["model", "targets_ms", "max_batch", "system", "load"], ["attainment_percent", "seed"], "slo_capacity")
    return tidy.sort_values("load", kind="stable")


def draw(frame: pd.DataFrame) -> Figure:
    """Left attainment over load, a line per system; right the load that each system serves at 99 and at 95 %."""
    model, targets = sizes_in_order(frame)[0], frame.targets_ms.iloc[0]
    sizes = sorted(frame.max_batch.unique())
    figure, axes = plt.subplots(len(sizes), 2, figsize=(PAGE_IN, 2.4 * len(sizes)), layout="constrained", squeeze=False)
    for size, (curves, bars) in zip(sizes, axes, strict=True):
        rows = frame[(frame.model == model) & (frame.max_batch == size)]
        _curves(curves, rows)
        title = f"{model}, {targets} ms, batches of {size}"
        curves.set(title=title, xlabel="load / the trace's", ylabel="requests within SLO [%]", ylim=(None, 101))
        _bars(bars, rows)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    say_backend(figure, frame)
    return figure


def _curves(axis: Axes, frame: pd.DataFrame) -> None:
    for system, look in looks(list(frame.system.unique())).items():
        line = over_seeds(frame[frame.system == system], ["load"], "attainment_percent")
        axis.plot(line.load, line["median"], label=look.label, color=look.color, marker=look.marker, dashes=look.dashes or (1, 0))
        axis.fill_between(line.load, line.low, line.high, color=look.color, alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(sorted(frame.load.unique())))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))


def _bars(axis: Axes, frame: pd.DataFrame) -> None:
    rows = [
        {
            "system": system,
            "seed": seed,
            "level": f"{level:g} %",
            "load": load_at(list(run.load), list(run.attainment_percent), level),
        }
        for (system, seed), run in frame.groupby(["system", "seed"], sort=False)
        for level in _LEVELS
    ]
    systems = {name: BarLook(look.label, look.color) for name, look in looks(list(frame.system.unique())).items()}
    order = [f"{level:g} %" for level in _LEVELS]
    grouped_bars(axis, pd.DataFrame(rows), groups="level", series="system", value="load", order=order, looks=systems)
    # A bar that ends there says nothing about loads beyond.
    axis.set(title=f"load served, up to {frame.load.max():g} tried", ylabel="load / the trace's", xlabel="of requests within SLO")
