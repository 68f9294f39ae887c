"""Print the parts of live scale-outs from the timelines that scripts/gpu_bursts.py --timelines has kept.

python scripts/scaleout_parts.py [--brief] FOLDER...
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from lambdascale.calibration import scaleout_parts
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser


def main() -> None:
    """Print each folder's tables; times in seconds since the first request unless a column says ms."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="timelines of a run")
    parser.add_argument("--brief", action="store_true", help="only the replicas' starts and the tokens by time")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        controller, nodes = scaleout_parts.read(folder)
        steps = scaleout_parts.steps(controller)
        formed, last = steps.at_s[steps.what == "pipeline"], steps.at_s[steps.what == "last block"].max()
        print(f"\n== {folder.name}: last block {last:.3f} s")
        if not arguments.brief:
            print(steps.to_string(index=False, float_format="%.3f"))
        print(scaleout_parts.gaps(controller, nodes).to_string(index=False, float_format="%.1f"))
        if len(formed) and not arguments.brief:
            print(f"from the pipeline to the last block, {1e3 * (last - formed.min()):.0f} ms:")
            print(scaleout_parts.busy(nodes, formed.min(), last).to_string(index=False))
        if not arguments.brief:
            print("the half second after the last block:")
            print(scaleout_parts.busy(nodes, last, last + 0.5).to_string(index=False))
        times = [round(last + after, 3) for after in np.arange(-0.5, 2.3, 0.25)]
        print(scaleout_parts.tokens_by(controller, times).T.to_string(header=False, float_format="%.2f"))


if __name__ == "__main__":
    sys.exit(run_guarded(main))
