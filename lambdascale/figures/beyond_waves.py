"""Beyond the paper: waves of requests, each of which scales out from one source by a multicast."""

from __future__ import annotations

from lambdascale.figures.curves import Curves

FIGURE = Curves(
    name="beyond_waves",
    x="wave",
    x_label="requests per wave",
    measures=[("ttft_p90_s", "P90 TTFT [s]"), ("gpu_seconds", "GPU-seconds")],
    log_x=True,
    log_y=True,
)
