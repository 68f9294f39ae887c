"""Draw the figures from the committed tables: python scripts/figures.py [--only NAME ...] [--tables DIR] [--out DIR]."""

import sys
from pathlib import Path

from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.figures.registry import FIGURES, MEASURED, figures_in, load_table, render


def main() -> None:
    parser = Parser(description="Draw figures from tables, without running anything.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"figures to draw: {', '.join([*FIGURES, *MEASURED])}")
    parser.add_argument("--tables", type=Path, default=Path("results/tables"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/figures"), metavar="DIR", help="(default: %(default)s)")
    arguments = parser.parse_args()
    for name in arguments.only or figures_in(arguments.tables):
        for path in render(name, load_table(arguments.tables, name), arguments.out):
            print(path)


if __name__ == "__main__":
    sys.exit(run_guarded(main))
