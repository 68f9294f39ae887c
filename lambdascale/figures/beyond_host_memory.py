"""Beyond the paper: many models on nodes with less host memory."""

from __future__ import annotations

from lambdascale.core import parse_size
from lambdascale.figures.curves import Curves


def _gibibytes(size: object) -> float:
    assert isinstance(size, str | int), "a size is a number or a text with a unit"
    return parse_size(size) / 2**30


FIGURE = Curves(
    name="beyond_host_memory",
    x="host_memory",
    x_label="host memory of a node [GiB]",
    measures=[("ttft_p90_s", "P90 TTFT [s]"), ("gpu_seconds", "GPU-seconds")],
    log_x=True,
    number=_gibibytes,
)
