"""Execution of studies: all their runs, then their tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lambdascale.core import UserError
from lambdascale.experiments.collect import study_table, write_study
from lambdascale.experiments.outcomes import Outcome, report_errors, worst
from lambdascale.experiments.study import Study, as_published, chosen, command_lines, load_study

# Runs the Hydra multirun of a command line, in the named part of the sweep's folder; returns the outcomes of its jobs.
Multirun = Callable[[Sequence[str], str], list[Outcome]]


def run_study(study: Study, overrides: Sequence[str], multirun: Multirun) -> int:
    """Make all runs of a study, then its table and figure; return the exit status.

    A study of several experiments continues with the next one after a failed run.
    """
    if not study.experiments:
        return _run_one(study, overrides, multirun)
    others = [override for override in overrides if not override.startswith("experiment=")]
    return max(_run_member([f"experiment={name}", *others], multirun) for name in study.experiments)


def _run_member(overrides: Sequence[str], multirun: Multirun) -> int:
    study = load_study(overrides)
    if study is None:
        raise UserError(f"{overrides[0]} is not a study")
    return run_study(study, overrides, multirun)


def _run_one(study: Study, overrides: Sequence[str], multirun: Multirun) -> int:
    experiment = str(chosen(overrides, "experiment"))
    lines = command_lines(study, overrides)
    outcomes = [outcome for number, line in enumerate(lines) for outcome in multirun(line, f"{experiment}-{number}")]
    # One mistake often fails all runs: report each different error once.
    report_errors(list({outcome.error: outcome for outcome in reversed(outcomes)}.values()))
    print(f"{experiment}: {len(outcomes)} runs, {sum(outcome.reused for outcome in outcomes)} of them reused", flush=True)
    if not worst(outcomes):
        # Grids may share a run if the user's overrides removed their differences.
        folders = [Path(folder) for folder in dict.fromkeys(outcome.folder for outcome in outcomes)]
        results = Path(chosen(overrides, "results") or "results")
        for path in write_study(experiment, study_table(study, folders), results, published=as_published(overrides)):
            print(f"  {path}", flush=True)
    return worst(outcomes)
