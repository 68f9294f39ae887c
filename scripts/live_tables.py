"""Make the tables of live runs: python scripts/live_tables.py --cluster measured/NAME [--only NAME] [--out DIR].

Make the profile NAME of this machine first:
lambdascale profile --threads 1 --sharing 4 --model smollm2 --out conf/cluster/measured/NAME.yaml.
About 40 minutes; finished runs are reused.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from lambdascale.cli.guard import run_guarded
from lambdascale.core import UserError
from lambdascale.experiments.live_study import execute_while_load, sim_vs_live

TABLES = ("sim_vs_live", "execute_while_load")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run live clusters on this machine and write their results beside those of simulations."
    )
    parser.add_argument("--cluster", metavar="NAME", help="measured profile of this machine (for sim_vs_live)")
    parser.add_argument("--only", choices=TABLES, help="make this table only")
    parser.add_argument("--results", default="results", metavar="DIR", help="folder of the runs (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/tables"), metavar="DIR", help="folder of the tables (default: %(default)s)"
    )
    arguments = parser.parse_args()
    wanted = [arguments.only] if arguments.only else list(TABLES)
    if "sim_vs_live" in wanted and arguments.cluster is None:
        raise UserError("sim_vs_live needs --cluster: a profile of this machine, made by lambdascale profile")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        made = (
            sim_vs_live(arguments.cluster, arguments.results) if name == "sim_vs_live" else execute_while_load(arguments.results)
        )
        path = arguments.out / f"{name}.csv"
        made.to_csv(path, index=False, float_format="%.4g")
        Console().print(f"{path} (live)", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_guarded(main))
