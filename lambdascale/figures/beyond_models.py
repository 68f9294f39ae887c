"""Beyond the paper: many models on one cluster."""

from __future__ import annotations

from lambdascale.figures.curves import Curves

FIGURE = Curves(
    name="beyond_models",
    x="models",
    x_label="models on the cluster",
    measures=[("ttft_p50_s", "median TTFT [s]"), ("ttft_p90_s", "P90 TTFT [s]"), ("gpu_seconds", "GPU-seconds")],
)
