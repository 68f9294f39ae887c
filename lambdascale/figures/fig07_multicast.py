"""Figure 7: time for a model to reach all nodes, by system, model and number of nodes."""

from __future__ import annotations

from lambdascale.figures.curves import Curves

FIGURE = Curves(
    name="fig07_multicast",
    x="nodes",
    x_label="nodes, source included",
    measures=[("all_nodes_s", "time to all nodes [s]")],
    log_y=True,
)
