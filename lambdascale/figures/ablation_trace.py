"""Ablation: λScale's parts one by one, on a bursty trace."""

from __future__ import annotations

from lambdascale.figures.switches import Switches

FIGURE = Switches(
    name="ablation_trace", measures=[("ttft_p90_s", "P90 TTFT, / λScale's"), ("gpu_seconds", "GPU time, / λScale's")]
)
