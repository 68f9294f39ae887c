"""Figures by name, from tables to files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.core import UserError
from lambdascale.figures import fig07_multicast, fig10_ttft, fig11_gpus
from lambdascale.figures.style import styled


@dataclass(frozen=True)
class FigureModule:
    """What a figure's module offers."""

    tidy: Callable[[pd.DataFrame], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]


FIGURES = {
    "fig07_multicast": FigureModule(fig07_multicast.tidy, fig07_multicast.draw),
    "fig10_ttft": FigureModule(fig10_ttft.tidy, fig10_ttft.draw),
    "fig11_gpus": FigureModule(fig11_gpus.tidy, fig11_gpus.draw),
}


def _check_name(name: str) -> None:
    if name not in FIGURES:
        raise UserError(f"there is no figure {name!r}; choose from {', '.join(FIGURES)}")


def render(name: str, table: pd.DataFrame, out: Path) -> list[Path]:
    """Draw a figure from its table as PDF and PNG, byte for byte the same for the same table; the paths."""
    _check_name(name)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.pdf", out / f"{name}.png"]
    with styled():
        figure = FIGURES[name].draw(FIGURES[name].tidy(table))
        try:
            figure.savefig(paths[0], metadata={"CreationDate": None, "Producer": None, "Creator": None})
            figure.savefig(paths[1], metadata={"Software": None})
        finally:
            plt.close(figure)
    return paths


def load_table(directory: Path, name: str) -> pd.DataFrame:
    """A committed table, CSV or parquet; UserError if there is none."""
    _check_name(name)
    for suffix, read in ((".parquet", pd.read_parquet), (".csv", pd.read_csv)):
        path = directory / f"{name}{suffix}"
        if path.is_file():
            table: pd.DataFrame = read(path)
            return table
    raise UserError(f"there is no table {name}.csv or {name}.parquet in {directory}; scripts/tables.py makes it")
