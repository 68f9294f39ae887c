"""Make the tables of comparison: python scripts/tables.py [--tables DIR] [--page FILE].

From the tables of the studies: paper_vs_ours.csv, also as a block of docs/paper.md. Simulated on the spot:
multicast_vs_reference.csv.
"""

import argparse
import sys
from pathlib import Path

from lambdascale.cli.guard import run_guarded
from lambdascale.experiments.multicast_study import reference_table
from lambdascale.experiments.paper_table import load_tables, markdown, paper_table, with_block


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the studies' tables with the paper and with the reference's measurements."
    )
    parser.add_argument("--tables", type=Path, default=Path("results/tables"), metavar="DIR")
    parser.add_argument("--page", type=Path, default=Path("docs/paper.md"), metavar="FILE")
    arguments = parser.parse_args()
    table = paper_table(load_tables(arguments.tables))
    page = with_block(arguments.page.read_text(), "paper_vs_ours", markdown(table))
    reference_table().to_csv(arguments.tables / "multicast_vs_reference.csv", index=False, float_format="%.6g")
    table.to_csv(arguments.tables / "paper_vs_ours.csv", index=False)
    arguments.page.write_text(page)
    print(f"{arguments.tables / 'multicast_vs_reference.csv'} (simulated)")
    print(f"{arguments.tables / 'paper_vs_ours.csv'} and its block in {arguments.page}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
