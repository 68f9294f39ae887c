"""Figure 8: throughput ramp-up after a burst, by system."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.figures.grid import checked
from lambdascale.figures.rampup import served, token_rate, typical_seed
from lambdascale.figures.style import PAGE_IN, looks, say_backend, sizes_in_order

_POINTS = 90


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per request, from the typical seed of each system; UserError for gaps in the table."""
    values = ["seed", "first_token_s", "finished_s", "output_tokens"]
    rows = checked(frame, ["model", "system"], values, "fig08_rampup")
    parts = [typical_seed(part) for _, part in rows.groupby(["model", "system"], sort=False)]
    return pd.concat(parts, ignore_index=True)


def draw(frame: pd.DataFrame) -> Figure:
    """A column per model: share of requests with a first token over time, and tokens per second."""
    models = sizes_in_order(frame)
    figure, axes = plt.subplots(2, len(models), figsize=(PAGE_IN, 3.7), squeeze=False, layout="constrained")
    for (share, rate), model in zip(axes.T, models, strict=True):
        rows = frame[frame.model == model]
        start_s = max(rows.first_token_s.min() / 2, 1e-4)
        end_s = rows.first_token_s.max() * 1.5
        grid = np.geomspace(start_s, end_s, _POINTS + 1)
        for system, look in looks(list(frame.system.unique())).items():
            part = rows[rows.system == system]
            times, shares = served(part)
            style = {"color": look.color, "dashes": look.dashes or (1, 0)}
            steps = np.concatenate([[start_s], times, [end_s]]), np.concatenate([[0.0], shares, [1.0]])
            share.step(*steps, where="post", label=look.label, **style)
            rate.plot(np.sqrt(grid[1:] * grid[:-1]), token_rate(part, grid), **style)
        share.set(title=model, xscale="log", xlim=(start_s, end_s), ylim=(0, 1.03))
        rate.set(xlabel="time since the burst [s]", xscale="log", xlim=(start_s, end_s), ylim=(0, None))
    axes[0][0].set_ylabel("share of requests\nwith a first token")
    axes[1][0].set_ylabel("tokens / s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))
    say_backend(figure, frame)
    return figure
