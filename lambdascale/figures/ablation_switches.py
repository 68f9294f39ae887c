"""Ablation: λScale's parts one by one, on a burst."""

from __future__ import annotations

from lambdascale.figures.switches import Switches

FIGURE = Switches(
    name="ablation_switches",
    measures=[("ttft_max_s", "until all are served, / λScale's"), ("finished_s", "until all are answered, / λScale's")],
)
