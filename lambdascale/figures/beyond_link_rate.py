"""Beyond the paper: a burst on slower and faster networks."""

from __future__ import annotations

from lambdascale.core import parse_rate
from lambdascale.figures.curves import Curves


def _gigabits(rate: object) -> float:
    assert isinstance(rate, str | int | float), "a rate is a number or a text with a unit"
    return parse_rate(rate) * 8 / 1e9


FIGURE = Curves(
    name="beyond_link_rate",
    x="nic",
    x_label="link rate [Gb/s]",
    measures=[("ttft_p50_s", "median TTFT of the burst [s]"), ("ttft_max_s", "until all are served [s]")],
    log_x=True,
    log_y=True,
    number=_gigabits,
)
