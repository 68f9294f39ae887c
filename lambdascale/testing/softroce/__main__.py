"""Command line of ``scripts/softroce``; see its --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lambdascale.core import UserError
from lambdascale.testing.softroce.machine import run


def main(arguments: Sequence[str]) -> int:
    """Run a command in the virtual machine; return its exit status, or 2 after one line on stderr for a user's mistake."""
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
        "The machine sees this one's files; its changes are lost, except in /run/results (--results). The exit status is the "
        "command's, 124 after a timeout, 125 if the machine failed.",
    )
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="time limit in seconds (default: %(default)s)")
    parser.add_argument("--memory-mib", type=int, default=3072, metavar="N", help="memory in MiB (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder to mount as the machine's /run/results")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="command to run in the machine")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
