"""Log finished runs to Weights & Biases: python scripts/log_wandb.py results/raw/EXPERIMENT [logger.KEY=VALUE ...]."""

import sys

from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.experiments.finished import log_to_wandb

if __name__ == "__main__":
    parser = Parser(description=__doc__.splitlines()[0].partition(":")[0] + ".")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder, or one above several")
    parser.add_argument("overrides", nargs="*", metavar="logger.KEY=VALUE", help="settings of the logger")
    given = parser.parse_args()
    sys.exit(run_guarded(lambda: log_to_wandb([*given.folders, *given.overrides])))
