"""One run at a glance: every request's TTFT by its arrival, and the GPUs in use. For browsing; no figure of the paper."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambdascale.figures.style import PAGE_IN, require_columns, say_backend, styled

# First tokens from whole replicas and from pipelines that were still loading (Okabe and Ito's blue and vermilion).
_MODES = {"local": ("#0072B2", "o"), "pipeline": ("#D55E00", "^")}


def draw(requests: pd.DataFrame, gpus: pd.DataFrame, end_s: float) -> Figure:
    """Draw a run of ``end_s`` seconds. ``requests``: rows of requests.parquet with ``backend``; ``gpus``: rows of gpus.parquet.

    UserError if ``requests`` is empty or lacks a column.
    """
    require_columns(requests, ("arrival_s", "ttft_s", "first_token_mode", "backend"), "run_overview")
    figure, (ttft, in_use) = plt.subplots(2, 1, figsize=(PAGE_IN, 3.6), sharex=True, layout="constrained")
    _ttft(ttft, requests)
    total = gpus.sort_values("at_s", kind="stable").groupby("at_s").delta.sum().cumsum()
    times, held = [*total.index, end_s], [*total, total.iloc[-1] if len(total) else 0]
    in_use.step(times, held, where="post", color="#000000", linewidth=1.0)
    in_use.set(xlabel="time [s]", ylabel="GPUs in use", ylim=(0, None))
    in_use.yaxis.get_major_locator().set_params(integer=True)
    say_backend(figure, requests)
    return figure


def _ttft(axis: Axes, requests: pd.DataFrame) -> None:
    for mode, (color, marker) in _MODES.items():
        rows = requests[requests.first_token_mode == mode]
        axis.scatter(rows.arrival_s, rows.ttft_s, s=6, color=color, marker=marker, linewidths=0, label=f"{mode} ({len(rows)})")
    axis.set(ylabel="TTFT [s]", yscale="log")
    axis.legend(title="first token from", title_fontsize=7, loc="upper right", markerscale=2)


def render_overview(requests: pd.DataFrame, gpus: pd.DataFrame, end_s: float, out: Path) -> list[Path]:
    """Draw into the folder ``out`` as PNG; return the paths."""
    path = out / "run_overview.png"
    with styled():
        figure = draw(requests, gpus, end_s)
        try:
            figure.savefig(path, metadata={"Software": None})
        finally:
            plt.close(figure)
    return [path]
