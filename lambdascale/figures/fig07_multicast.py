"""Figure 7: how long a model takes to reach all nodes, by system, model and number of nodes."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.core import UserError
from lambdascale.figures.style import (
    PAGE_IN,
    looks,
    require_all_systems,
    require_columns,
    require_one_backend,
    say_backend,
    sizes_in_order,
)

REQUIRED = ("model", "system", "nodes", "multicast_s", "backend")


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per point; ``nodes`` counts the source. UserError for points without a time, or with several."""
    require_columns(frame, REQUIRED, "fig07_multicast")
    require_one_backend(frame, "fig07_multicast")
    require_all_systems(frame, "fig07_multicast")
    keys = ["model", "system", "nodes"]
    bad = frame[frame.multicast_s.isna() | frame.duplicated(keys, keep=False)]
    if len(bad):
        point = ", ".join(str(bad.iloc[0][key]) for key in keys)
        raise UserError(f"fig07_multicast: the point ({point}) needs exactly one time")
    return frame.loc[:, list(REQUIRED)]


def draw(frame: pd.DataFrame) -> Figure:
    """A panel per model: time over group size, one line per system, from a tidy frame."""
    models = sizes_in_order(frame)
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
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))
    say_backend(figure, frame)
    return figure
