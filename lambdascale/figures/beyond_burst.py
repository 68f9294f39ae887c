"""Beyond the paper: bursts of different sizes."""

from __future__ import annotations

from lambdascale.figures.curves import Curves

FIGURE = Curves(
    name="beyond_burst",
    x="burst",
    x_label="requests in the burst",
    measures=[("ttft_p90_s", "P90 TTFT [s]"), ("gpu_seconds", "GPU-seconds")],
    log_x=True,
    log_y=True,
)
