"""Execution of studies: all their runs, then their tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

from lambdascale.core import UserError
from lambdascale.experiments.collect import study_table, write_study
from lambdascale.experiments.outcomes import Outcome, report_errors, worst
from lambdascale.experiments.pool import Job, processes, run_jobs
from lambdascale.experiments.study import Study, as_published, chosen, command_lines, expand, in_pool, load_study

# Runs the Hydra multirun of a command line, in the named part of the sweep's folder; returns the outcomes of its jobs.
Multirun = Callable[[Sequence[str], str], list[Outcome]]


@dataclass(frozen=True)
class _Member:
    """A study with its command lines, and the jobs of those that the pool runs."""

    study: Study
    overrides: Sequence[str]
    lines: tuple[Sequence[str], ...]
    jobs: Mapping[int, Sequence[Job]]

    @property
    def experiment(self) -> str:
        return str(chosen(self.overrides, "experiment"))


def run_study(study: Study, overrides: Sequence[str], multirun: Multirun, stamp: str) -> int:
    """Make all runs of a study, or of its studies, then their tables and figures; return the exit status.

    All runs that need no launcher of Hydra's share one pool of processes. A failed run costs its studies their tables only.
    """
    members = [_member(part, own) for part, own in _studies(study, overrides)]
    jobs = [job for member in members for jobs in member.jobs.values() for job in jobs]
    with processes() as pool:
        made = run_jobs(pool, jobs, stamp)
        outcomes = [_outcomes(member, made, multirun) for member in members]
        # One mistake often fails all runs: report each different error once.
        report_errors(list({o.error: o for found in outcomes for o in reversed(found)}.values()))
        if jobs:
            tables = [pool.submit(_write, *pair) for pair in zip(members, outcomes, strict=True)]
            for table in as_completed(tables):
                print(table.result(), flush=True)
        else:
            for pair in zip(members, outcomes, strict=True):
                print(_write(*pair), flush=True)
    return max(worst(found) for found in outcomes)


def _studies(study: Study, overrides: Sequence[str]) -> Iterator[tuple[Study, Sequence[str]]]:
    if not study.experiments:
        yield study, overrides
        return
    others = [override for override in overrides if not override.startswith("experiment=")]
    for name in study.experiments:
        own = [f"experiment={name}", *others]
        part = load_study(own)
        if part is None:
            raise UserError(f"{own[0]} is not a study")
        yield from _studies(part, own)


def _member(study: Study, overrides: Sequence[str]) -> _Member:
    lines = tuple(command_lines(study, overrides))
    return _Member(study, overrides, lines, {number: expand(line) for number, line in enumerate(lines) if in_pool(line)})


def _outcomes(member: _Member, made: Mapping[Job, Outcome], multirun: Multirun) -> list[Outcome]:
    """Outcomes of a study's runs in the order of its grids; the runs that the pool did not make are made now."""
    found: list[Outcome] = []
    for number, line in enumerate(member.lines):
        if number in member.jobs:
            found += [made[job] for job in member.jobs[number]]
        else:
            found += multirun(line, f"{member.experiment}-{number}")
    return found


def _write(member: _Member, outcomes: Sequence[Outcome]) -> str:
    """Write a study's table and figure unless a run failed; return what to print about it."""
    text = [f"{member.experiment}: {len(outcomes)} runs, {sum(outcome.reused for outcome in outcomes)} of them reused"]
    if core_s := sum(outcome.core_s for outcome in outcomes):
        text[0] += f", {core_s:.0f} s of one core"
    if not worst(outcomes):
        # Grids may share a run if the user's overrides removed their differences.
        folders = [Path(folder) for folder in dict.fromkeys(outcome.folder for outcome in outcomes)]
        results = Path(chosen(member.overrides, "results") or "results")
        table = study_table(member.study, folders)
        text += [f"  {path}" for path in write_study(member.experiment, table, results, published=as_published(member.overrides))]
    return "\n".join(text)
