"""Make the tables of comparison: python scripts/tables.py [--tables DIR] [--page FILE] [--readme FILE] [--beliefs FILE]
[--baselines DIR].

From the tables of the studies: paper_vs_ours.csv and sensitivity_flips.csv, also as blocks of docs/paper.md;
cold_start_ratios.csv; node starts, beside figure 10; the section «What we believe, and how sure we are» of README.md; the effects
of departures in baselines/*/README.md. Simulated on the spot: multicast_vs_reference.csv.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.experiments import beliefs, cold_starts, departures, sensitivity, starts_text
from lambdascale.experiments.multicast_study import reference_table
from lambdascale.experiments.paper_table import load_tables, paper_table
from lambdascale.experiments.paper_text import markdown, with_block


def main() -> None:
    parser = Parser(description="Compare the studies' tables with the paper and with the reference's measurements.")
    parser.add_argument(
        "--tables", type=Path, default=Path("results/tables"), metavar="DIR", help="folder of the tables (default: %(default)s)"
    )
    parser.add_argument(
        "--page", type=Path, default=Path("docs/paper.md"), metavar="FILE", help="page of the comparison (default: %(default)s)"
    )
    parser.add_argument(
        "--readme", type=Path, default=Path("README.md"), metavar="FILE", help="page of the beliefs (default: %(default)s)"
    )
    parser.add_argument(
        "--beliefs",
        type=Path,
        default=Path("results") / beliefs.TEMPLATE,
        metavar="FILE",
        help="template of the beliefs (default: %(default)s)",
    )
    parser.add_argument(
        "--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="folder of the baselines (default: %(default)s)"
    )
    arguments = parser.parse_args()
    tables, texts = arguments.tables, beliefs.Tables(arguments.tables)
    compared, varied = paper_table(load_tables(tables)), texts["sensitivity"]
    blocks = {
        "paper_vs_ours": markdown(compared),
        "sensitivity": sensitivity.markdown(varied),
        starts_text.BLOCK: starts_text.text(texts["paper_trace"]),
        departures.BLOCK: departures.markdown(texts["departures"], departures.OURS),
    }
    written = {
        "paper_vs_ours": compared,
        "sensitivity_flips": sensitivity.flips(varied),
        "multicast_vs_reference": reference_table(),
        "cold_start_ratios": cold_starts.ratios(texts["cold_starts"]),
    }
    for name, table in written.items():
        _write(table, tables / f"{name}.csv")
    # After the tables: the beliefs read them.
    _fill(arguments.page, blocks)
    believed = beliefs.render(arguments.beliefs.read_text(), texts)
    _fill(arguments.readme, {beliefs.BLOCK: believed})
    for baseline in departures.DEPARTURES.keys() - {departures.OURS}:
        text = departures.markdown(texts["departures"], baseline)
        _fill(arguments.baselines / baseline / "README.md", {departures.BLOCK: text})


def _fill(path: Path, blocks: Mapping[str, str]) -> None:
    text = path.read_text()
    for name, block in blocks.items():
        text = with_block(text, name, block)
    path.write_text(text)
    print(f"{path}: {', '.join(blocks)}")


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.6g")
    print(f"{path} (simulated)")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
