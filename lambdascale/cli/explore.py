"""``lambdascale explore``: the control plane in simulation under faults drawn from seeds."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lambdascale.core import UserError
from lambdascale.experiments.progress import JobProgress

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from lambdascale.explore.explorer import Tally


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "explore",
        help="try the control plane in simulation under faults drawn from seeds",
        description="Each seed is a small simulated cluster, a workload and faults: lost, slow and returning nodes, late and "
        "repeated messages, failures, a stopped controller, a clock that steps. Named invariants are checked after every event. "
        "A seed that breaks one is shrunk to the faults that matter, and printed with the command that replays it. Exit status: "
        "0 nothing found, 1 something found.",
    )
    parser.add_argument("--seeds", required=True, metavar="A:B", help="seeds A to B-1, or one seed")
    parser.add_argument(
        "--system", metavar="NAME", help="a choice of conf/system, or a YAML file of a system (default: as the seed says)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument(
        "--faults", metavar="I,J,...|none|all", help="replay one seed with these of its faults alone, and print its timeline"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="add a row to FOLDER/reliability.csv")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Explore or replay; return 1 if an invariant does not hold."""
    seeds = _seeds(arguments.seeds)
    if arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {arguments.jobs}")
    if arguments.faults is not None:
        if len(seeds) != 1:
            raise UserError(f"--faults replays one seed, not {len(seeds)}: --seeds {seeds[0]}:{seeds[0] + 1}")
        if arguments.out is not None:
            raise UserError("--out adds a row for seeds with all their faults: leave --faults out")
        return _replay(seeds[0], arguments.system, arguments.faults)
    return _explore(seeds, arguments.system, arguments.jobs, arguments.out)


def _seeds(text: str) -> range:
    match = re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", text)
    if match is None:
        raise UserError(f"--seeds takes A:B or one seed, not {text}")
    first = int(match[1])
    seeds = range(first, first + 1 if match[2] is None else int(match[2]))
    if not seeds:
        raise UserError(f"--seeds {text} names no seed: B must be above A")
    return seeds


def _replay(seed: int, system: str | None, chosen: str) -> int:
    from lambdascale.explore.run import run as drive
    from lambdascale.explore.scenario import draw
    from lambdascale.explore.timeline import Timeline

    scenario = draw(seed, system)
    kept = _kept(chosen, len(scenario.faults))
    print(scenario.summary)
    for index in kept:
        print(f"fault {index}: {scenario.faults[index]}")
    timeline = Timeline(print)
    outcome = drive(scenario.only(kept), observers=(timeline,), struck=timeline.struck)
    print(f"{outcome.broken} does not hold: {outcome.case}" if outcome.broken else "every invariant holds")
    return 1 if outcome.broken else 0


def _kept(chosen: str, faults: int) -> list[int]:
    if chosen in ("none", "all"):
        return list(range(faults)) if chosen == "all" else []
    if re.fullmatch(r"\d{1,4}(,\d{1,4})*", chosen) is None:
        raise UserError(f"--faults takes indices like 0,2, none or all, not {chosen}")
    kept = sorted({int(index) for index in chosen.split(",")})
    if kept[-1] >= faults:
        raise UserError(f"--faults {chosen}: this seed has {faults} faults, counted from 0")
    return kept


def _explore(seeds: range, system: str | None, jobs: int, out: Path | None) -> int:
    from lambdascale.explore.explorer import add_to_table, check_table, explore

    if out is not None:
        check_table(out)
    began = time.perf_counter()
    with JobProgress(len(seeds), "seeds") as shown:

        def progress(part: Tally) -> None:
            shown.advance(part.seeds.total())
            for found in part.found:
                print(f"seed {found.seed} ({found.preset}): {found.broken} does not hold: {found.case}", flush=True)
                print(f"    {found.command(system)}", flush=True)

        tally = explore(seeds, system=system, jobs=jobs, progress=progress)
    _report(tally, time.perf_counter() - began)
    if out is not None:
        chosen = f" --system {system}" if system else ""
        add_to_table(tally, out, f"lambdascale explore --seeds {seeds.start}:{seeds.stop}{chosen} --jobs {jobs}", system)
    return 1 if tally.found else 0


def _report(tally: Tally, wall_s: float) -> None:
    seeds = tally.seeds.total()
    print(
        f"{seeds} seeds ({len(tally.seeds)} systems), {tally.events} events, {wall_s:.0f} s ({seeds / wall_s:.0f} seeds/s): "
        f"{len(tally.found)} found"
    )
