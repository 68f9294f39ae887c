"""``lambdascale calibrate``: the simulation of a live run beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lambdascale.core import UserError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from lambdascale.experiments.calibration import Calibration


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "calibrate",
        help="simulate a live run, and say how far off the simulation is and which constants would have to change",
        description="Simulate the requests of a finished live run on its configuration. Print the error of each metric, the "
        "constants of the cluster that the live run contradicts (iterations from TPOT, rates from the durations of transfers), "
        "and the errors of a second simulation with these changed.",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a finished run with backend=live")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the errors, as .csv")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and print; return the exit status. UserError for what is no finished live run."""
    if arguments.out is not None and arguments.out.suffix != ".csv":
        raise UserError(f"--out must name a .csv file, not {arguments.out}")
    # Imported only here: a live run's configuration needs torch, which takes seconds to import.
    from lambdascale.experiments.calibration import calibrate
    from lambdascale.metrics import write_whole

    found = calibrate(arguments.run_folder)
    show(found)
    if arguments.out is not None:
        write_whole(arguments.out, found.errors.to_csv(index=False, float_format="%.6g"))
        print(f"wrote {arguments.out}")
    return 0


def show(found: Calibration) -> None:
    """Print errors and constants."""
    import pandas as pd

    table = Table("metric", "", found.backend, "simulated", "error", "error after", title="Errors of the simulation")
    for row in found.errors.to_dict("records"):
        values = ["" if pd.isna(row[name]) else f"{row[name]:.4g}" for name in ("live", "simulated")]
        errors = ["-" if pd.isna(row[name]) else f"{row[name]:+.1f} %" for name in ("error_percent", "error_after_percent")]
        table.add_row(row["metric"], row["statistic"], *values, *errors)
    Console().print(table)
    for constant in found.constants:
        change = "each value" if constant.value is None else f"{constant.value:.4g} -> {constant.suggested:.4g}"
        print(f"{constant.key}: {change}{'' if constant.factor is None else f' (times {constant.factor:.3g})'}")
    if found.startup_s is not None:
        print(f"a new instance's first token comes {found.startup_s:+.3g} s later than simulated, with these constants")
    if found.left_out:
        print(f"{found.left_out} requests without a known answer are left out of the simulation")
    if found.failed:
        print(f"{found.failed} requests that the live run failed are served in the simulation; times are of those both answered")
