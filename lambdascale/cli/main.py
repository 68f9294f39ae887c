"""The ``lambdascale`` command. Each subcommand is a thin module; the logic is in the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lambdascale import __version__
from lambdascale.cli import calibrate, doctor, explore, export, multicast, pack, plan, profile, serve, sweep_rate
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and all its subcommands."""
    parser = Parser(prog="lambdascale", description="Tools of the λScale reproduction. Experiments are run by scripts/run.py.")
    parser.add_argument("--version", action="version", version=f"lambdascale {__version__}")
    subcommands: argparse._SubParsersAction[argparse.ArgumentParser] = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )
    plan.add_parser(subcommands)
    pack.add_parser(subcommands)
    multicast.add_parser(subcommands)
    profile.add_parser(subcommands)
    doctor.add_parser(subcommands)
    serve.add_parser(subcommands)
    explore.add_parser(subcommands)
    export.add_parser(subcommands)
    calibrate.add_parser(subcommands)
    sweep_rate.add_parser(subcommands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return run_guarded(lambda: arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
