"""Figures 8, 10 and 11 live on GPUs, with the simulator on the machine's measured profile beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lambdascale.figures.grid import checked
from lambdascale.figures.style import PAGE_IN, looks, say_backend, sizes_in_order

_PANELS = ("rampup", "ttft", "gpus")
_SIDES: dict[str, dict[str, Any]] = {"live": {"linewidth": 1.6}, "simulated": {"linewidth": 0.8, "dashes": (2, 1)}}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table's curves; UserError for missing columns or values. A panel's title names the systems that it lacks."""
    return checked(frame, ["panel", "model", "system"], ["at", "live", "simulated"], "gpu_live", complete=False)


def draw(frame: pd.DataFrame) -> Figure:
    """Draw a row per model: tokens per second after a burst, share of requests that wait longer, GPU-seconds so far."""
    models = sizes_in_order(frame)
    size = (PAGE_IN, 2.0 * len(models) + 0.4)
    figure, axes = plt.subplots(len(models), len(_PANELS), figsize=size, squeeze=False, layout="constrained")
    systems = looks(list(frame.system.unique()))
    for (rampup, ttft, gpus), model in zip(axes, models, strict=True):
        rows = frame[frame.model == model]
        for system, look in systems.items():
            mine = rows[rows.system == system]
            for side, style in _SIDES.items():
                _curve(rampup, mine[mine.panel == "rampup"], "at", side, look.color, style)
                _curve(gpus, mine[mine.panel == "gpus"], "at", side, look.color, style)
                tail = mine[mine.panel == "ttft"].assign(longer=lambda part: 1 - part["at"])
                _curve(ttft, tail[tail.longer > 0], side, "longer", look.color, style)
        rampup.set(xlabel="time since the burst [s]", ylabel="tokens / s", ylim=(0, None))
        ttft.set(xlabel="TTFT [s]", ylabel="share waiting longer", xscale="log", yscale="log")
        gpus.set(xlabel="time [s]", ylabel="GPU-seconds so far", ylim=(0, None))
        for panel, axis in zip(_PANELS, (rampup, ttft, gpus), strict=True):
            drawn = set(rows[rows.panel == panel].system)
            lacking = [look.label for system, look in systems.items() if system not in drawn]
            axis.set_title(f"{model}, not run: {', '.join(lacking)}" if lacking else model)
            axis.set_visible(bool(drawn))
    handles = [Line2D([], [], color=look.color, label=look.label, linewidth=1.6) for look in systems.values()]
    handles += [Line2D([], [], color="0.3", label=side, **style) for side, style in _SIDES.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(systems))
    say_backend(figure, frame)
    return figure


def _curve(axis: Axes, rows: pd.DataFrame, x: str, y: str, color: str, style: Mapping[str, Any]) -> None:
    axis.plot(rows[x], rows[y], color=color, **style)
