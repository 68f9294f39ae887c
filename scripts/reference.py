"""Write the reference of all configuration keys: python scripts/reference.py [--out FILE]."""

import sys
from pathlib import Path

from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.experiments.reference import reference
from lambdascale.metrics import write_whole


def main() -> None:
    parser = Parser(description="Write the reference of all configuration keys, from conf/ and the classes.")
    parser.add_argument("--out", type=Path, default=Path("docs/reference.md"), metavar="FILE", help="(default: %(default)s)")
    arguments = parser.parse_args()
    write_whole(arguments.out, reference())
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(run_guarded(main))
