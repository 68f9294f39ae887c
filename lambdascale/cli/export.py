"""``lambdascale export``: the requests of a run in the format of another harness."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lambdascale.core import UserError
from lambdascale.experiments.folder import MANIFEST, SUMMARY, check_whole, read_json

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from lambdascale.exchange import Results

# The same as in lambdascale.exchange, which is imported when it is needed: pandas takes half a second.
_FORMATS = ("vllm-bench", "aiperf", "csv")


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "export",
        help="write the requests of a run in the format of vllm bench serve, of AIPerf, or as CSV",
        description="Write the requests of a finished run as vLLM's benchmark JSON, as AIPerf's records (profile_export.jsonl) "
        "or as CSV. A file of one of these formats may take the place of the run: then it is converted.",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a finished run, or a .json, .jsonl or .csv file")
    parser.add_argument("--format", required=True, choices=_FORMATS, help="format of the file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: standard output)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export; return the exit status. UserError for what is no finished run."""
    from lambdascale.exchange import FORMATS
    from lambdascale.metrics import write_whole

    results = load(arguments.run_folder)
    text = FORMATS[arguments.format].text(results)
    if not results.has_gaps:
        print("the gaps between tokens are left out: not all are known (runs with token_times=true keep them)", file=sys.stderr)
    if arguments.out is None:
        sys.stdout.write(text)
        return 0
    write_whole(arguments.out, text)
    label = "simulated" if results.backend == "sim" else results.backend
    print(f"wrote {arguments.out}: {len(results.requests)} requests ({label})")
    return 0


def load(place: Path) -> Results:
    """Results of a run's folder, or of a harness's file; UserError if it is neither."""
    import pandas as pd

    from lambdascale.exchange import read_results
    from lambdascale.exchange.results import results_of

    if not place.exists():
        raise UserError(f"{place} does not exist: export takes a run's folder, such as results/raw/EXPERIMENT/RUN")
    if place.is_file():
        return read_results(place)
    if not (place / MANIFEST).is_file() or not (place / SUMMARY).is_file():
        raise UserError(f"{place} is not the folder of a finished run: it has no {MANIFEST} and {SUMMARY}")
    check_whole(place)
    return results_of(pd.read_parquet(place / "requests.parquet"), read_json(place / SUMMARY))
