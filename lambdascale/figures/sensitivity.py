"""Sensitivity: a tornado per conclusion, from the table of pairs of experiment=sensitivity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lambdascale.core import UserError
from lambdascale.figures.style import PAGE_IN, log_ticks, looks, require_columns, require_one_backend, say_backend, sizes_in_order

_NAME, _BASE = "sensitivity", "base"
_PUBLISHED = (2.4, 5.0)
_COLUMNS = ("run", "model", "system", "p90_ratio", "p90_low", "p90_high", "gpu_ratio", "gpu_low", "gpu_high", "backend")
# Setting -> label, unit of its values, and the factor from a value to that unit.
_LABELS: Mapping[str, tuple[str, float]] = {
    "control_interval_s": ("control interval [s]", 1.0),
    "gpu_keep_alive_s": ("idle GPU kept [s]", 1.0),
    "host_keep_alive_s": ("host copy kept [s]", 1.0),
    "ssd_bytes_per_s": ("SSD [GB/s]", 1e-9),
    "pcie_bytes_per_s": ("PCIe [GB/s]", 1e-9),
    "host_source_bytes_per_s": ("host source [GB/s]", 1e-9),
    "link_bytes_per_s": ("link [Gb/s]", 8e-9),
    "engine_of_bandwidth": ("engine [of bandwidth]", 1.0),
    "prefill_of_flops": ("prefill [of peak]", 1.0),
    "reckoned_speed": ("engine reckoned with [x]", 1.0),
    "reckoned_links": ("links reckoned with [x]", 1.0),
    "hop_latency_s": ("hop latency [µs]", 1e6),
    "send_start_up_s": ("start of a send [µs]", 1e6),
    "request_rate": ("requests [x]", 1.0),
    "time_compression": ("trace speed-up [x]", 1.0),
    "host_sources": ("host copies as sources", 1.0),
    "nccl_setup": ("NCCL set-up", 1.0),
    "nccl_outliers": ("NCCL set-ups of 18 to 120 s", 1.0),
    "nccl_chunk_bytes": ("NCCL chunk [MB]", 1e-6),
    "host_memory_bytes": ("host memory [GiB]", 2.0**-30),
    "initial_copies": ("host copies at first", 1.0),
    "target_per_replica": ("requests per replica", 1.0),
    "scale_outs": ("size of scale-outs", 1.0),
}
_UNITS = {"GB/s": 1e9, "Gb/s": 1e9 / 8, "GiB": 2.0**30}
_MEASURES = {"p90": "P90 TTFT, {} / λScale", "gpu": "GPU time below {} [%]"}
# Behind values, so that no line runs through them.
_PAPER = {"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
# Look of the value at the left (-1) and right (1) end of a bar.
_BESIDE: Mapping[int, Mapping[str, Any]] = {
    side: {"textcoords": "offset points", "fontsize": 5, "va": "center", "ha": ha, "zorder": 4, "bbox": _PAPER}
    for side, ha in ((-1, "right"), (1, "left"))
}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per model, system, setting and value: result and interval of both measures, GPU time as per cent saved.

    ``setting`` base has the defaults; ``label`` and ``shown`` are what a reader sees. UserError for rows without a base.
    """
    require_columns(frame, _COLUMNS, _NAME)
    require_one_backend(frame, _NAME)
    parts = frame.run.str.split("/", n=2, expand=True)
    rows = frame.assign(setting=parts[1], value=parts[2])
    bases = rows[rows.setting == _BASE]
    for model in sizes_in_order(rows):
        for system in rows[rows.model == model].system.unique():
            if bases[(bases.model == model) & (bases.system == system)].empty:
                raise UserError(f"{_NAME}: no row of {_BASE} for {system}, {model}")
        missing = sorted(set(rows.system) - set(rows[rows.model == model].system))
        if missing:
            raise UserError(f"{_NAME}: no rows of {', '.join(missing)} for {model}")
    for part, other in (("ratio", "ratio"), ("low", "low"), ("high", "high")):
        rows[f"gpu_{part}"] = 100 * (1 - 1 / rows[f"gpu_{other}"])
    rows["label"] = [_LABELS.get(s, (s.replace("_", " "), 1.0))[0] for s in rows.setting]
    rows["shown"] = [_shown(s, v) for s, v in zip(rows.setting, rows.value, strict=True)]
    return rows.reset_index(drop=True)


def _shown(setting: str, value: str) -> str:
    """Value of a setting in the unit of its label; None and words as words."""
    if value == "None":
        return "∞"
    number, scale = value, 1.0
    for unit, factor in _UNITS.items():
        if value.endswith(unit):
            number, scale = value.removesuffix(unit), factor
    try:
        shown = float(number) * scale * _LABELS.get(setting, ("", 1.0))[1]
        return f"{shown:.0f}" if abs(shown) >= 1000 else f"{shown:.3g}"
    except ValueError:
        return value.replace("_", " ")


def draw(frame: pd.DataFrame) -> Figure:
    """A row of panels per measure and model, a column per baseline; the widest bars on top."""
    models, systems = sizes_in_order(frame), list(looks(list(frame.system.unique())))
    rows = [(measure, model) for measure in _MEASURES for model in models]
    settings = len(set(frame.setting) - {_BASE})
    height = len(rows) * (0.55 + 0.135 * settings)
    # The backend's label stands above the titles.
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 0.15 / height))
    figure, axes = plt.subplots(len(rows), len(systems), figsize=(PAGE_IN, height), squeeze=False, layout=layout, sharey="row")
    for line, (measure, model) in zip(axes, rows, strict=True):
        part = frame[frame.model == model]
        order = _order(part, measure)
        for axis, system in zip(line, systems, strict=True):
            look = looks([system])[system]
            _tornado(axis, part[part.system == system], measure, order, look.color)
            axis.set_title(
                f"{_MEASURES[measure].format(look.label)}, {model.removeprefix('llama2_').upper()}", fontsize=6.5, loc="left"
            )
    figure.legend(handles=_key(), loc="outside upper center", ncols=5, fontsize=6)
    say_backend(figure, frame)
    return figure


def _key() -> list[Artist]:
    """Lines, areas and marks that all panels share."""
    return [
        Line2D([], [], color="black", linewidth=0.8, label="as configured"),
        Patch(facecolor="0.85", label="its interval of 95 %"),
        Line2D([], [], color="#B00020", linewidth=1.0, label="no difference"),
        Patch(facecolor="none", edgecolor="0.75", hatch="////", label=f"the paper's {_PUBLISHED[0]:g} to {_PUBLISHED[1]:g}"),
        Line2D([], [], color="0.4", linewidth=0, marker="|", markersize=5, label="with the value beside it"),
    ]


def _order(rows: pd.DataFrame, measure: str) -> list[str]:
    """Labels of the settings, those that move a result most first."""
    column = f"{measure}_ratio"
    base = rows[rows.setting == _BASE].set_index("system")[column]
    moved = (rows[column] - rows.system.map(base)).abs() / (rows.system.map(base).abs() if measure == "p90" else 1.0)
    swings = moved.groupby(rows.label).max().sort_values(ascending=False)
    return [str(label) for label in swings.index if label != _BASE]


def _tornado(axis: Axes, rows: pd.DataFrame, measure: str, order: list[str], color: str) -> None:
    """Bars from the smallest to the largest result of each setting, base included; ticks at results, values at the ends."""
    base = rows[rows.setting == _BASE].iloc[0]
    middle, low, high = (float(base[f"{measure}_{part}"]) for part in ("ratio", "low", "high"))
    if not math.isnan(low):
        axis.axvspan(low, high, color="0.85", linewidth=0, zorder=0)
    if measure == "p90":
        axis.axvspan(*_PUBLISHED, facecolor="none", edgecolor="0.75", hatch="////", linewidth=0, zorder=0)
    axis.axvline(1.0 if measure == "p90" else 0.0, color="#B00020", linewidth=1.0, zorder=1)
    axis.axvline(middle, color="black", linewidth=0.8, zorder=3)
    for place, label in enumerate(order):
        part = rows[rows.label == label]
        if part.empty:
            continue
        values = part[f"{measure}_ratio"].to_numpy(float)
        ends = min(middle, values.min()), max(middle, values.max())
        axis.barh(place, ends[1] - ends[0], 0.62, left=ends[0], color=color, alpha=0.55, zorder=2)
        axis.plot(values, [place] * len(values), "|", color=color, markersize=5, markeredgewidth=1.2, zorder=3)
        for at, side in ((int(values.argmin()), -1), (int(values.argmax()), 1)):
            if side * (values[at] - middle) > 0:
                axis.annotate(part.shown.iloc[at], (values[at], place), xytext=(3 * side, 0), **_BESIDE[side])
    axis.set(yticks=range(len(order)), yticklabels=order, ylim=(len(order) - 0.4, -0.6))
    axis.tick_params(axis="y", labelsize=5.5)
    axis.grid(visible=False, axis="y")
    results = rows[f"{measure}_ratio"]
    if measure == "p90":
        axis.set_xscale("log")
        axis.set_xlim(0.75 * min(1.0, results.min()), 1.45 * max(results.max(), _PUBLISHED[1]))
        log_ticks(axis.xaxis)
    else:
        room = 0.18 * (max(results.max(), 0) - min(results.min(), 0))
        axis.set_xlim(min(results.min(), 0) - room, max(results.max(), 0) + room)
