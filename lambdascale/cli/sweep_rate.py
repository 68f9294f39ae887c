"""``lambdascale sweep-rate``: raise the load until the cluster is overloaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambdascale.core import UserError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from lambdascale.experiments.rate_search import Point

_MOST_REFINEMENTS = 20


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "sweep-rate",
        help="raise the load until the cluster is overloaded, and say STABLE, BACKLOGGED or OVERLOADED for each rate",
        description="Run a configuration at rates that are doubled until the cluster does not keep up, then at rates in between. "
        "OVERLOADED: more than a tenth of the requests that arrive add to the open ones, or more than a hundredth fails. "
        "BACKLOGGED: half of the requests wait longer for a place than their answer takes. Finished runs are reused.",
    )
    parser.add_argument("--refine", type=int, default=3, metavar="N", help="rates to try in between (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table, as .csv")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as for scripts/run.py (without experiment= and workload=: experiment=sweep_rate, Poisson arrivals)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search and print; return the exit status. UserError for a user's mistake."""
    if not 0 <= arguments.refine <= _MOST_REFINEMENTS:
        raise UserError(f"--refine must be between 0 and {_MOST_REFINEMENTS}, not {arguments.refine}")
    if arguments.out is not None and arguments.out.suffix != ".csv":
        raise UserError(f"--out must name a .csv file, not {arguments.out}")
    if strange := [override for override in arguments.overrides if "=" not in override]:
        raise UserError(f"settings are given as KEY=VALUE, unlike {strange[0]}")
    # Imported only here: pandas and the experiments take a second to import.
    import pandas as pd

    from lambdascale.experiments.rate_search import search_rate
    from lambdascale.metrics import write_whole

    print(_line(*_HEAD))
    points = search_rate(arguments.overrides, arguments.refine, lambda point: print(_line(*_cells(point.row())), flush=True))
    if arguments.out is not None:
        write_whole(arguments.out, pd.DataFrame([point.row() for point in points]).to_csv(index=False, float_format="%.6g"))
        print(f"wrote {arguments.out}")
    print(conclusion(points))
    return 0


_HEAD = ("asked/s", "answered/s", "TTFT P90", "TPOT mean", "growth", "failed", "verdict")


def _line(*cells: str) -> str:
    return "  ".join(f"{cell:>10}" for cell in cells[:-1]) + f"  {cells[-1]}"


def _cells(row: dict[str, Any]) -> list[str]:
    numbers = [row[name] for name in ("requested_per_s", "achieved_per_s", "ttft_p90_s", "tpot_mean_s")]
    shown = ["-" if number is None else f"{number:.3g}" for number in numbers]
    return [*shown, f"{100 * row['growth']:.0f} %", str(row["failed"]), row["verdict"]]


def conclusion(points: list[Point]) -> str:
    """The highest rate below which all are stable, and the lowest that overloads, in a line."""
    rows = [point.row() for point in points]
    label = "simulated" if rows[0]["backend"] == "sim" else rows[0]["backend"]
    over = min(row["requested_per_s"] for row in rows if row["verdict"] == "OVERLOADED")
    first_bad = min(row["requested_per_s"] for row in rows if row["verdict"] != "STABLE")
    stable = [row["requested_per_s"] for row in rows if row["requested_per_s"] < first_bad]
    until = f"stable up to {max(stable):.3g} requests/s, " if stable else "stable at no rate that was tried, "
    return f"{until}overloaded from {over:.3g} requests/s ({label})"
