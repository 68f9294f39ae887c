"""Figure 7: how long a model takes to reach all nodes, by system, model and number of nodes."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.figures.style import PAGE_IN, looks, require_columns, say_backend

REQUIRED = ("model", "system", "nodes", "multicast_s", "backend")


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of one measurement each; ``nodes`` counts the source. Several seeds of one point become their median."""
    require_columns(frame, REQUIRED, "fig07_multicast")
    keys = ["model", "system", "nodes", "backend"]
    return frame.groupby(keys, sort=True)[["multicast_s"]].median().reset_index()


def draw(frame: pd.DataFrame) -> Figure:
    """A panel per model: time over group size, one line per system, from a tidy frame."""
    models = sorted(frame.model.unique(), key=lambda name: frame[frame.model == name].multicast_s.median())
    figure, axes = plt.subplots(1, len(models), figsize=(PAGE_IN, 2.3), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        rows = frame[frame.model == model]
        for system, look in looks(list(frame.system.unique())).items():
            line = rows[rows.system == system].sort_values("nodes")
            style = {"color": look.color, "marker": look.marker, "label": look.label}
            drawn = axis.plot(line.nodes, line.multicast_s, **style)
            if look.dashes:
                drawn[0].set_dashes(look.dashes)
        axis.set(title=model, xlabel="nodes, source included", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("time to all nodes [s]")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    say_backend(figure, frame)
    return figure
