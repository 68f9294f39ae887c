"""``scripts/softroce``: see its --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lambdascale.core import UserError
from lambdascale.testing.softroce.machine import run


def main(arguments: Sequence[str]) -> int:
    """The exit status is the command's; 2 with one line if this machine cannot have the virtual one."""
    given = _parser().parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    try:
        if not command:
            raise UserError("no command given: scripts/softroce COMMAND ...")
        results = None if given.results is None else given.results.absolute()
        if results is not None:
            results.mkdir(parents=True, exist_ok=True)
        return run(command, timeout_s=given.timeout, memory_mib=given.memory_mib, results=results, echo=sys.stdout).status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/softroce",
        description="Run a command in a virtual machine that has two RDMA devices (Soft-RoCE), in this checkout, with its .venv. "
        "The machine's files are this one's; its changes are lost, but for those in /run/results (--results). The exit "
        "status is the command's, 124 if its time is up, 125 if the machine did not come up.",
    )
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--memory-mib", type=int, default=3072, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="a folder that is the machine's /run/results")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
