"""Beyond the paper: one model multicast from one node to hundreds."""

from __future__ import annotations

from lambdascale.figures.curves import Curves

FIGURE = Curves(
    name="beyond_scale",
    x="nodes",
    x_label="nodes, source included",
    measures=[("all_nodes_s", "time to all nodes [s]")],
    log_x=True,
    log_y=True,
)
