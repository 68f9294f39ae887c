"""Make the tables of live runs.

python scripts/live_tables.py [--only NAME] [--cluster measured/NAME] [--results DIR] [KEY=VALUE ...]

Runs the studies live_fidelity and live_while_load (conf/experiment) and derives results/tables/sim_vs_live.csv and
execute_while_load.csv from their tables. First make a profile of this machine, called NAME:
lambdascale profile --threads 1 --sharing 4 --model smollm2 --out conf/cluster/measured/NAME.yaml.
About 40 minutes; finished runs are reused.

Overrides as for scripts/run.py choose or change runs (seed=1 takes a third of the time); such a table is written beside that of
its study, in results/raw, and does not replace the committed one.
"""

import sys
from pathlib import Path

import pandas as pd
from rich.console import Console

from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.experiments.collect import table_folder
from lambdascale.experiments.live_tables import LIVE_TABLES
from lambdascale.experiments.study import as_published
from lambdascale.experiments.sweep import main as sweep


def main() -> int:
    parser = Parser(description="Run live clusters on this machine and write their results beside those of simulations.")
    parser.add_argument("--only", choices=LIVE_TABLES, help="make this table only")
    parser.add_argument("--cluster", metavar="NAME", help="measured profile of this machine, for sim_vs_live")
    parser.add_argument("--results", default="results", metavar="DIR", help="folder of runs and tables (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the runs, as for scripts/run.py")
    arguments = parser.parse_args()
    status = 0
    for name in [arguments.only] if arguments.only else LIVE_TABLES:
        study, derive = LIVE_TABLES[name]
        profile = [f"cluster={arguments.cluster}"] if arguments.cluster and study == "live_fidelity" else []
        overrides = [f"experiment={study}", f"results={arguments.results}", *profile, *arguments.overrides]
        failed = sweep([*overrides, "-m"])
        status = max(status, failed)
        if not failed:
            results = Path(arguments.results)
            rows = table_folder(study, results, published=as_published(overrides)) / f"{study}.csv"
            path = (results / "tables" if as_published(arguments.overrides) else rows.parent) / f"{name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            table = derive(pd.read_csv(rows))
            table.to_csv(path, index=False, float_format="%.4g")
            Console().print(f"{path} ({', '.join(table.backend.unique())})", highlight=False, soft_wrap=True)
    return status


if __name__ == "__main__":
    sys.exit(run_guarded(main))
