"""Outcomes of the jobs of a sweep. Jobs may run on other machines, so each writes its outcome into a shared folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from lambdascale.experiments.folder import SUMMARY, read_json
from lambdascale.metrics import comparison, print_comparison


class Outcome(msgspec.Struct):
    """Outcome of one job: its run's folder, or an error and its exit status. ``value`` is that of ``objective``, in a search.

    ``core_s``: seconds of processor time that the job took, in a pool.
    """

    job: int
    label: str
    folder: str = ""
    reused: bool = False
    error: str = ""
    status: int = 0
    objective: str = ""
    value: float | None = None
    core_s: float = 0.0


def note(folder: Path, outcome: Outcome) -> None:
    """Write ``outcome`` into the sweep's ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    Path(folder, f"job-{outcome.job:05d}.json").write_bytes(msgspec.json.encode(outcome))


def read_outcomes(folder: Path) -> list[Outcome]:
    """Read the outcomes in the sweep's ``folder``, in the order of job numbers."""
    return [msgspec.json.decode(path.read_bytes(), type=Outcome) for path in sorted(folder.glob("job-*.json"))]


def worst(outcomes: Sequence[Outcome]) -> int:
    """Highest exit status of the outcomes; 0 without outcomes."""
    return max((outcome.status for outcome in outcomes), default=0)


def report(outcomes: Sequence[Outcome]) -> None:
    """Print a table of the finished runs and their folders to stdout, and the errors to stderr."""
    console = Console(width=max(140, Console().width) if not sys.stdout.isatty() else None)
    finished = [outcome for outcome in outcomes if outcome.folder]
    if finished:
        common = _common_overrides(finished)
        rows = [read_json(Path(o.folder) / SUMMARY) | {"label": _label(o.label, common)} for o in finished]
        print_comparison(console, comparison(rows), "runs")
        for outcome in finished:
            console.print(f"{'reused' if outcome.reused else 'wrote'} {outcome.folder}", highlight=False, soft_wrap=True)
    report_errors(outcomes)


def report_errors(outcomes: Sequence[Outcome]) -> None:
    """Print one line to stderr for every different error."""
    lines: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.error:
            where = f" ({outcome.label})" if len(outcomes) > 1 else ""
            lines.setdefault(outcome.error, f"error: {' '.join(outcome.error.split())}{where}")
    for line in lines.values():
        print(line, file=sys.stderr)


def _common_overrides(outcomes: Sequence[Outcome]) -> set[str]:
    """Overrides that all jobs share, which rows need not repeat."""
    return set.intersection(*(set(outcome.label.split(",")) for outcome in outcomes))


def _label(overrides: str, common: set[str]) -> str:
    """Overrides that distinguish a job, without the system's (which has its own column)."""
    return " ".join(part for part in overrides.split(",") if part not in common and not part.startswith("system="))
