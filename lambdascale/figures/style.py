"""One palette and style for all figures. Okabe and Ito's colours are safe for colour-blind readers; line styles differ too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from lambdascale.core import UserError

PAGE_IN = 7.0  # width of a page of a two-column paper


@dataclass(frozen=True)
class Look:
    """Label, colour, dashes and marker of a system in every figure."""

    label: str
    color: str
    dashes: tuple[float, ...] | str = ""
    marker: str = "o"


LOOKS = {
    "lambdascale": Look("λScale", "#D55E00", "", "o"),
    "lambdascale_tuned": Look("λScale, tuned", "#E69F00", (6, 1), "h"),
    "lambdascale_prototype": Look("λScale (prototype)", "#F0B07A", (4, 1.2, 1, 1.2), "d"),
    "faasnet": Look("FaaSNet", "#0072B2", (4, 1.2), "s"),
    "faasnet_prototype": Look("FaaSNet (prototype)", "#56B4E9", (4, 1.2, 1, 1.2), "D"),
    "nccl_broadcast": Look("NCCL", "#009E73", (2, 1), "^"),
    "nccl_prototype": Look("NCCL (prototype)", "#5FBF9F", (4, 1.2, 1, 1.2), ">"),
    "nccl_no_setup": Look("NCCL, no set-up", "#8FD9C0", (2, 1), "v"),
    "serverlessllm": Look("ServerlessLLM", "#CC79A7", (5, 1.2, 1, 1.2, 1, 1.2), "P"),
    "serverlessllm_prototype": Look("ServerlessLLM (prototype)", "#7E4B6B", (1, 1), "X"),
    "ideal": Look("Ideal", "#000000", (1, 1.2), "*"),
    "ideal_prototype": Look("Ideal (prototype)", "#606060", (4, 1.2, 1, 1.2), "*"),
}
# Remaining colours, for systems that are not built in, in the order of their names.
_SPARE = ("#E69F00", "#999999", "#F0E442")
_SPARE_DASHES = ((3, 1, 1, 1), (6, 2), (1, 2), (2, 2, 6, 2), (8, 1))
_SPARE_MARKERS = ("h", "p", "<", ">")
# (ratio of the ends of a logarithmic axis, ticks per decade); an axis takes the first pair whose ratio is larger than its own.
_LOG_TICKS = (
    (3.0, (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)),
    (8.0, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)),
    (200.0, (1.0, 2.0, 5.0)),
    (float("inf"), (1.0,)),
)

_RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "lambdascale",
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style while drawing, without needing a display."""
    backend = mpl.get_backend()
    mpl.use("Agg")
    try:
        with sns.axes_style("ticks"), mpl.rc_context(_RC):
            yield
    finally:
        mpl.use(backend)


def looks(systems: Sequence[str]) -> dict[str, Look]:
    """Look of each system: known systems first in their fixed order, then the others by name.

    A variant (``lambdascale_x``) has the colour of its system and dashes of its own.
    """
    known = [name for name in LOOKS if name in systems]
    others = sorted(set(systems) - set(known))
    return {name: LOOKS[name] for name in known} | {name: _other(name, i) for i, name in enumerate(others)}


def _other(name: str, index: int) -> Look:
    dashes, marker = _SPARE_DASHES[index % len(_SPARE_DASHES)], _SPARE_MARKERS[index % len(_SPARE_MARKERS)]
    base = max((known for known in LOOKS if name.startswith(f"{known}_")), key=len, default=None)
    if base is not None:
        return Look(f"{LOOKS[base].label} ({name.removeprefix(base)[1:].replace('_', ' ')})", LOOKS[base].color, dashes, marker)
    return Look(name, _SPARE[index % len(_SPARE)], dashes, marker)


def log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, as many as its range has room for. The axis limits must be final."""
    low, high = axis.get_view_interval()
    subs = next(subs for ratio, subs in _LOG_TICKS if high / low < ratio)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def sizes_in_order(frame: pd.DataFrame) -> list[str]:
    """Models of a table in the order of their first rows."""
    return [str(model) for model in dict.fromkeys(frame.model)]


def require_one_backend(frame: pd.DataFrame, figure: str) -> None:
    """Raise UserError if rows of one system come from several backends: a line is either simulated or live."""
    mixed = frame.groupby("system").backend.nunique()
    if (mixed > 1).any():
        raise UserError(f"{figure}: {mixed.index[mixed > 1][0]} has rows of several backends; filter the table first")


def require_all_systems(frame: pd.DataFrame, figure: str) -> None:
    """Raise UserError unless every system has rows for every model of the table."""
    for model in sizes_in_order(frame):
        missing = sorted(set(frame.system) - set(frame[frame.model == model].system))
        if missing:
            raise UserError(f"{figure}: no rows of {', '.join(missing)} for {model}")


def require_columns(frame: pd.DataFrame, columns: Sequence[str], figure: str) -> None:
    """Raise UserError unless the table has rows and all ``columns``."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise UserError(f"{figure}: the table lacks the columns {', '.join(missing)}")
    if frame.empty:
        raise UserError(f"{figure}: the table has no rows")


def say_backend(figure: Figure, frame: pd.DataFrame) -> None:
    """Write the backends of the rows (simulated, live, reference) onto the figure."""
    # A row that has both sides of a comparison says "live and sim".
    kinds = sorted({kind for backend in set(frame.backend) for kind in backend.split(" and ")})
    words = {"sim": "simulated", "live": "live", "reference": "reference"}
    figure.text(
        0.998, 0.995, " and ".join(words.get(k, k) for k in kinds), ha="right", va="top", fontsize=6, style="italic", alpha=0.7
    )


def mark_setups(figure: Figure, table: pd.DataFrame) -> None:
    """Mark the systems in a finished figure whose communicators had more ranks than were measured, and say so below it.

    The table's column ``setup`` (empty, or «up to N ranks: BASIS») names them; a table without it, or without any, marks none.
    """
    if "setup" not in table.columns:
        return
    marked = table[table.setup.notna() & (table.setup != "")]
    for system in marked.system.unique():
        # In labels and titles, but not where the system's name begins the name of another.
        name = re.compile(rf"{re.escape(looks([system])[system].label)}(?!, | \()")
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            text.set_text(name.sub(lambda found: f"{found[0]}†", text.get_text()))
    if len(marked):
        setups = sorted(marked.setup.unique(), key=lambda text: int(text.split()[2]))
        note = f"†: time to set a communicator up not measured ({setups[-1]})"
        figure.supxlabel(note, fontsize=6, style="italic", alpha=0.7, x=0.002, ha="left")
