"""Run experiments: python scripts/run.py [experiment=NAME] [overrides] [-m]. See conf/ for the choices."""

import sys

from lambdascale.cli.guard import run_guarded
from lambdascale.experiments.sweep import main

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
