"""Beyond the paper: a slow NIC, or a node that dies, while a burst is served."""

from __future__ import annotations

import json

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from lambdascale.figures.bars import BarLook, grouped_bars
from lambdascale.figures.grid import checked
from lambdascale.figures.style import PAGE_IN, looks, say_backend

_HATCHES = {"faasnet": "//", "nccl_broadcast": "\\\\", "serverlessllm": ".."}


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run with ``fault`` in words; UserError for gaps in the table."""
    found = [_words(slow, dead) for slow, dead in zip(frame.get("slow_nodes", []), frame.get("node_failures", []), strict=True)]
    return checked(frame.assign(fault=found), ["system", "fault"], ["ttft_p50_s", "ttft_max_s"], "beyond_faults")


def _words(slow: str, dead: str) -> str:
    parts = [f"{_who(node)}\nNIC at\n{share:.0%}" for node, share in json.loads(slow)]
    parts += [f"{_who(node)}\ndies at\n{at_s:g} s" for node, at_s in json.loads(dead)]
    return "\n".join(parts) or "no\nfault"


def _who(node: int) -> str:
    return "source" if node == 0 else f"node {node}"


def draw(frame: pd.DataFrame) -> Figure:
    """Bars per fault: TTFT of the median request, and of the last one."""
    faults, systems = list(dict.fromkeys(frame.fault)), looks(list(frame.system.unique()))
    shown = {name: BarLook(look.label, look.color, _HATCHES.get(name, "")) for name, look in systems.items()}
    figure, axes = plt.subplots(2, 1, figsize=(PAGE_IN, 4.0), layout="constrained", sharex=True)
    for axis, value, label in zip(
        axes, ("ttft_p50_s", "ttft_max_s"), ("median TTFT [s]", "until all are served [s]"), strict=True
    ):
        grouped_bars(axis, frame, groups="fault", series="system", value=value, order=faults, looks=shown)
        axis.set(ylabel=label)
        # Ticks independent of the height of the axes: the layout measures tick labels before it sets that height.
        axis.yaxis.set_major_locator(MultipleLocator(2))
    axes[1].tick_params(axis="x", labelsize=6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    say_backend(figure, frame)
    return figure
