"""Log finished runs to Weights & Biases: python scripts/log_wandb.py results/raw/EXPERIMENT [logger.KEY=VALUE ...]."""

import sys

from lambdascale.cli.guard import run_guarded
from lambdascale.experiments.finished import log_to_wandb

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: log_to_wandb(sys.argv[1:])))
