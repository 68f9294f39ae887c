"""Make the committed tables anew: python scripts/tables.py [--arrivals FILE --azure FILE] [--out DIR].

Without traces only the multicast tables are made.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console

from lambdascale.cli.guard import run_guarded
from lambdascale.core import UserError
from lambdascale.experiments.collect import gpu_rows, request_rows
from lambdascale.experiments.multicast_study import fig07_table, reference_table
from lambdascale.experiments.trace_study import paper_table, run_traces, summary_table


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate what the committed tables hold and write them.")
    parser.add_argument("--arrivals", type=Path, metavar="FILE", help="the λScale authors' 30-minute trace")
    parser.add_argument("--azure", type=Path, metavar="FILE", help="the Azure 2023 conversation trace")
    parser.add_argument("--results", default="results", metavar="DIR", help="where runs go (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/tables"), metavar="DIR")
    arguments = parser.parse_args()
    if (arguments.arrivals is None) != (arguments.azure is None):
        raise UserError("the trace tables need both --arrivals and --azure")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(fig07_table(), arguments.out / "fig07_multicast.csv")
    write(reference_table(), arguments.out / "multicast_vs_reference.csv")
    if arguments.arrivals is None:
        return
    runs = run_traces(arguments.arrivals, arguments.azure, arguments.results)
    summaries = summary_table(runs)
    write(summaries, arguments.out / "trace_summaries.csv")
    write(paper_table(summaries), arguments.out / "paper_vs_ours.csv")
    shown = [r.result.folder for r in runs if r.trace == "authors_compressed" and r.seed == 1]
    request_rows(shown).to_parquet(arguments.out / "fig10_ttft.parquet", index=False, compression="zstd")
    gpu_rows(shown).to_parquet(arguments.out / "fig11_gpus.parquet", index=False, compression="zstd")


def write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.6g")
    Console().print(f"{path} (simulated)", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_guarded(main))
