"""Figure 11: GPUs in use over time, cumulative GPU-seconds, and their gap to ideal scaling, by system."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambdascale.core import UserError
from lambdascale.figures.style import (
    PAGE_IN,
    Look,
    looks,
    require_all_systems,
    require_columns,
    require_one_backend,
    say_backend,
    sizes_in_order,
)

REQUIRED = ("model", "system", "at_s", "gpus", "backend")
_POINTS = 60
_IDEAL = "ideal"


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean GPUs in use and GPU-seconds so far, on a grid of equal windows. UserError for gaps in the table.

    Input: steps in time order, each valid until the next; the last row of a system is the end of its run.
    """
    require_columns(frame, REQUIRED, "fig11_gpus")
    require_one_backend(frame, "fig11_gpus")
    require_all_systems(frame, "fig11_gpus")
    if _IDEAL not in set(frame.system):
        raise UserError(f"fig11_gpus: no rows of {_IDEAL} to compare with")
    parts = []
    for (model, system, backend), steps in frame.groupby(["model", "system", "backend"], sort=False):
        grid = np.linspace(0.0, frame[frame.model == model].at_s.max(), _POINTS + 1)
        cumulative = _integral(steps.at_s.to_numpy(), steps.gpus.to_numpy(), grid)
        width = max(grid[1] - grid[0], 1e-12)
        columns = {"at_s": grid[1:], "gpus": np.diff(cumulative) / width, "gpu_seconds": cumulative[1:]}
        parts.append(pd.DataFrame({"model": model, "system": system, "backend": backend, **columns}))
    return pd.concat(parts, ignore_index=True)


def _integral(at_s: np.ndarray, gpus: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """GPU-seconds used up to each point of ``grid``: the exact integral of the steps, which end with the last one."""
    order = np.argsort(at_s, kind="stable")
    times, values = at_s[order], gpus[order]
    at_steps = np.concatenate([[0.0], np.cumsum(values[:-1] * np.diff(times))])
    grid = np.minimum(grid, times[-1])
    index = np.searchsorted(times, grid, side="right") - 1
    inside = np.clip(index, 0, None)
    total = at_steps[inside] + values[inside] * (grid - times[inside])
    return np.where(index < 0, 0.0, total)


def draw(frame: pd.DataFrame) -> Figure:
    """A row per model: GPUs in use, cumulative GPU-seconds, and their final excess over ideal scaling."""
    models = sizes_in_order(frame)
    figure, axes = plt.subplots(
        len(models), 3, figsize=(PAGE_IN, 1.9 * len(models) + 0.3), squeeze=False, layout="constrained", width_ratios=(3, 3, 2)
    )
    systems = looks(list(frame.system.unique()))
    for (in_use, cumulative, gap), model in zip(axes, models, strict=True):
        rows = frame[frame.model == model]
        for system, look in systems.items():
            line = rows[rows.system == system]
            style = {"color": look.color, "label": look.label, "dashes": look.dashes or (1, 0)}
            in_use.plot(line.at_s, line.gpus, linewidth=1.0, **style)
            cumulative.plot(line.at_s, line.gpu_seconds, **style)
        in_use.set(title=model, xlabel="time [s]", ylabel="GPUs in use\n(window mean)", ylim=(0, None))
        cumulative.set(title=model, xlabel="time [s]", ylabel="GPU-seconds so far", ylim=(0, None))
        _gap_to_ideal(gap, rows, systems)
        gap.set_title(model)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))
    say_backend(figure, frame)
    return figure


def _gap_to_ideal(axis: Axes, rows: pd.DataFrame, systems: Mapping[str, Look]) -> None:
    total = rows.groupby("system").gpu_seconds.max()
    others = [system for system in systems if system != _IDEAL]
    above = [100 * (total[system] / total[_IDEAL] - 1) for system in others]
    axis.barh(range(len(others)), above, color=[systems[system].color for system in others], height=0.7)
    for place, value in enumerate(above):
        axis.annotate(f" {value:.0f} %", (value, place), va="center", fontsize=6)
    axis.set(xlabel="GPU time\nabove ideal [%]", xlim=(0, max([*above, 1.0]) * 1.25))
    axis.set_yticks(range(len(others)), [""] * len(others))
    for place, system in enumerate(others):  # as texts, which marks can be added to
        axis.text(-0.06, place, systems[system].label, fontsize=6, ha="right", va="center", transform=axis.get_yaxis_transform())
    axis.grid(visible=False, axis="y")
    axis.invert_yaxis()
