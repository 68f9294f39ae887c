"""``lambdascale doctor``: check this machine for all that a live cluster needs, with advice on what is missing."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lambdascale.core import UserError
from lambdascale.diagnostics.checks import Check, machine_checks
from lambdascale.diagnostics.disk import check_request, disk
from lambdascale.diagnostics.rdma import rdma_checks

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_COLOURS = {"ok": "green", "missing": "red", "warning": "yellow"}


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "doctor",
        help="check this machine for all that a live cluster needs",
        description="Check this machine for all that a live cluster needs, with advice on what is missing. "
        "The exit status is 0 whatever the result.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--disk", type=Path, default=Path(), metavar="DIR", help="directory on the disk to measure (default: the current one)"
    )
    parser.add_argument(
        "--disk-mib", type=int, default=256, metavar="N", help="size in MiB of the test file on the disk (default: %(default)s)"
    )
    parser.add_argument("--no-disk", action="store_true", help="do not measure the disk")
    parser.add_argument(
        "--rdma", action="store_true", help="check only what --transport rdma needs, with a write through every port"
    )
    parser.add_argument(
        "--rdma-mib", type=int, default=64, metavar="N", help="MiB to write through each port (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check this machine and print the report; return 0. UserError for wrong arguments."""
    if arguments.rdma:
        return _report(rdma_checks(mib=_positive(arguments.rdma_mib)), arguments.json)
    directory = arguments.disk.absolute()
    if not arguments.no_disk:
        check_request(directory, arguments.disk_mib)
    checks = machine_checks()
    if not arguments.no_disk:
        checks.append(disk(directory, arguments.disk_mib))
    return _report(checks, arguments.json)


def _positive(mib: int) -> int:
    if mib <= 0:
        raise UserError(f"--rdma-mib must be positive, not {mib}")
    return mib


def _report(checks: list[Check], as_json: bool) -> int:
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        show(checks)
    return 0


def show(checks: list[Check]) -> None:
    """Print a table with one row per check."""
    table = Table("check", "status", title="This machine, for a live cluster", show_lines=True)
    for heading in ("found", "what to do"):
        # Users copy paths and commands from these columns, so they are never truncated.
        table.add_column(heading, overflow="fold")
    for check in checks:
        colour = _COLOURS[check.status]
        table.add_row(escape(check.name), f"[{colour}]{check.status}[/{colour}]", escape(check.found), escape(check.advice))
    Console().print(table)
