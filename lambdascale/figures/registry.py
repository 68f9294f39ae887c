"""Registry of figures by name, and their drawing from tables to files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lambdascale.core import UserError
from lambdascale.figures import (
    ablation_blocks,
    ablation_order,
    ablation_switches,
    ablation_trace,
    attribution,
    beyond_burst,
    beyond_faults,
    beyond_host_memory,
    beyond_link_rate,
    beyond_models,
    beyond_scale,
    beyond_waves,
    cold_starts,
    fig01_burstiness,
    fig02_host_cache,
    fig07_multicast,
    fig08_rampup,
    fig09_sources,
    fig10_ttft,
    fig11_gpus,
    gpu_live,
    interference,
    sensitivity,
    slo_capacity,
    token_gaps,
)
from lambdascale.figures.style import mark_setups, styled


class FigureModule(Protocol):
    """Interface of a figure: its module, or an object in the module."""

    def tidy(self, frame: pd.DataFrame, /) -> pd.DataFrame:
        """Convert the figure's table into the frame it draws; UserError for a table that would mislead."""
        ...

    def draw(self, frame: pd.DataFrame, /) -> Figure:
        """Draw a tidy frame."""
        ...


FIGURES: dict[str, FigureModule] = {
    "fig01_burstiness": fig01_burstiness,
    "fig02_host_cache": fig02_host_cache,
    "fig07_multicast": fig07_multicast.FIGURE,
    "fig08_rampup": fig08_rampup,
    "fig09_sources": fig09_sources,
    "fig10_ttft": fig10_ttft,
    "fig11_gpus": fig11_gpus,
    "ablation_blocks": ablation_blocks,
    "ablation_order": ablation_order,
    "ablation_switches": ablation_switches.FIGURE,
    "ablation_trace": ablation_trace.FIGURE,
    "attribution": attribution,
    "beyond_scale": beyond_scale.FIGURE,
    "beyond_link_rate": beyond_link_rate.FIGURE,
    "beyond_burst": beyond_burst.FIGURE,
    "beyond_waves": beyond_waves.FIGURE,
    "beyond_models": beyond_models.FIGURE,
    "beyond_host_memory": beyond_host_memory.FIGURE,
    "beyond_faults": beyond_faults,
    "sensitivity": sensitivity,
    "slo_capacity": slo_capacity,
    "interference": interference,
    "token_gaps": token_gaps,
    "cold_starts": cold_starts,
}

#: Figures of what was measured on lent machines, and the script that makes their table: no study has them.
MEASURED: dict[str, tuple[FigureModule, str]] = {"gpu_live": (gpu_live, "scripts/gpu_figures.py --compare")}

# Formats of a figure, and what matplotlib would write into them that differs between equal drawings.
_FORMATS: dict[str, Mapping[str, None]] = {
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    ".png": {"Software": None},
}


def figures_in(directory: Path) -> list[str]:
    """Return the figures to draw from a folder of tables: all of studies, and those measured ones whose table it has."""
    return [*FIGURES, *(name for name in MEASURED if _table(directory, name) is not None)]


def _module(name: str) -> FigureModule:
    if name in MEASURED:
        return MEASURED[name][0]
    if name not in FIGURES:
        raise UserError(f"unknown figure {name!r}; choose from {', '.join([*FIGURES, *MEASURED])}")
    return FIGURES[name]


def render(name: str, table: pd.DataFrame, out: Path) -> list[Path]:
    """Draw a figure from its table as PDF and PNG, byte-identical for equal tables; return their paths.

    Each is written as a whole or not at all. UserError as ``tidy``, and for a folder that cannot be written.
    """
    module = _module(name)
    with styled():
        figure = module.draw(module.tidy(table))
        mark_setups(figure, table)
        try:
            return [_saved(figure, out / f"{name}{suffix}", metadata) for suffix, metadata in _FORMATS.items()]
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
        finally:
            plt.close(figure)


def _saved(figure: Figure, path: Path, metadata: Mapping[str, None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_table(directory: Path, name: str) -> pd.DataFrame:
    """Read the table of a figure, CSV or parquet; UserError for an unknown figure or a missing table."""
    _module(name)
    path = _table(directory, name)
    if path is None:
        maker = MEASURED[name][1] if name in MEASURED else f"scripts/run.py experiment={name} -m"
        raise UserError(f"no table {name}.csv or {name}.parquet in {directory}; {maker} makes it")
    table: pd.DataFrame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    return table


def _table(directory: Path, name: str) -> Path | None:
    """Return the file of a figure's table; None without one."""
    return next((path for suffix in (".parquet", ".csv") if (path := directory / f"{name}{suffix}").is_file()), None)
