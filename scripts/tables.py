"""Make the tables of comparison: python scripts/tables.py [--tables DIR] [--page FILE] [--readme FILE] [--beliefs FILE].

From the tables of the studies: paper_vs_ours.csv and sensitivity_flips.csv, also as blocks of docs/paper.md, and the section
«What we believe, and how sure we are» of README.md. Simulated on the spot: multicast_vs_reference.csv.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from lambdascale.cli.guard import run_guarded
from lambdascale.experiments import beliefs, sensitivity
from lambdascale.experiments.multicast_study import reference_table
from lambdascale.experiments.paper_table import load_tables, markdown, paper_table, with_block


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the studies' tables with the paper and with the reference's measurements."
    )
    parser.add_argument("--tables", type=Path, default=Path("results/tables"), metavar="DIR")
    parser.add_argument("--page", type=Path, default=Path("docs/paper.md"), metavar="FILE")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE")
    parser.add_argument("--beliefs", type=Path, default=Path("results") / beliefs.TEMPLATE, metavar="FILE")
    arguments = parser.parse_args()
    tables, texts = arguments.tables, beliefs.Tables(arguments.tables)
    compared, varied = paper_table(load_tables(tables)), texts["sensitivity"]
    page = with_block(arguments.page.read_text(), "paper_vs_ours", markdown(compared))
    page = with_block(page, "sensitivity", sensitivity.markdown(varied))
    written = {
        "paper_vs_ours": compared,
        "sensitivity_flips": sensitivity.flips(varied),
        "multicast_vs_reference": reference_table(),
    }
    for name, table in written.items():
        _write(table, tables / f"{name}.csv")
    arguments.page.write_text(page)
    text = beliefs.render(arguments.beliefs.read_text(), texts)
    arguments.readme.write_text(with_block(arguments.readme.read_text(), beliefs.BLOCK, text))
    print(f"blocks of {arguments.page} and {arguments.readme}")


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.6g")
    print(f"{path} (simulated)")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
