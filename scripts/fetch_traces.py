#!/usr/bin/env python
"""Download public request traces: python scripts/fetch_traces.py --list, then python scripts/fetch_traces.py NAME ..."""

import sys

from lambdascale.cli.guard import run_guarded
from lambdascale.workload.fetch import main

if __name__ == "__main__":
    sys.exit(run_guarded(main))
