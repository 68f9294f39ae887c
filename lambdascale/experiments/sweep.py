"""The Hydra application behind scripts/run.py: runs, sweeps and studies under any launcher, a table and one status at the end."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lambdascale.cli.guard import user_message
from lambdascale.core import UserError
from lambdascale.experiments.compose import conf_dir
from lambdascale.experiments.outcomes import Outcome, note, read_outcomes, report, report_errors, worst
from lambdascale.experiments.runner import run
from lambdascale.experiments.schema import register_schema
from lambdascale.experiments.search import objective_value, report_search
from lambdascale.experiments.study import chosen, load_study
from lambdascale.experiments.study_runs import run_study

_PREFIX = ".sweep-"


class _SearchEnded(BaseException):
    """A job of a search failed and left word of it: there is no value to return, so the search ends.

    No Exception, since Hydra and its sweepers would go on with those, each with a remark of its own on stderr.
    """


def main(argv: list[str]) -> int:
    """Run Hydra on ``argv`` (overrides and Hydra's flags); the exit status is the worst of the jobs'.

    What a launcher itself fails with (a lost worker, a job over its time) is raised, after the report on the jobs that ended.
    """
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _hush()
    # In the current folder, as the results are: jobs may run on other machines, which share it but no /tmp.
    sweep = Path.cwd() / f"{_PREFIX}{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    # argparse takes overrides in one piece only; -m may stand anywhere.
    flags = [argument for argument in argv if argument in ("-m", "--multirun")]
    overrides = [argument for argument in argv if argument not in flags]
    asks_only = any(argument.startswith("-") for argument in overrides)
    study = None if asks_only else load_study(overrides)
    try:
        if study is not None and flags:
            return run_study(study, overrides, lambda line, part: _multirun(line, sweep / part))
        if study is not None and study.experiments:
            raise UserError(f"experiment={chosen(overrides, 'experiment')} stands for several: run it with -m")
        outcomes, failure = _hydra(overrides, flags, sweep)
        report(outcomes)
        report_search(sweep, outcomes)
    finally:
        shutil.rmtree(sweep, ignore_errors=True)
    if failure is not None and not isinstance(failure, _SearchEnded):
        raise _with_hint(failure)
    return worst(outcomes)


def _hydra(overrides: Sequence[str], flags: Sequence[str], sweep: Path) -> tuple[list[Outcome], BaseException | None]:
    """One Hydra run or multirun: how its jobs ended, which they note in the folder ``sweep``, and what it failed with itself."""
    sys.argv = [sys.argv[0], *overrides, f"hydra.sweep.dir={_quoted(str(sweep))}", *flags]
    failure: BaseException | None = None
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(_job)()
    except (Exception, _SearchEnded) as error:
        failure = error
    return read_outcomes(sweep), failure


def _multirun(overrides: Sequence[str], sweep: Path) -> list[Outcome]:
    """A multirun that is part of a study."""
    outcomes, failure = _hydra(overrides, ["-m"], sweep)
    if failure is not None:
        report_errors(outcomes)
        raise _with_hint(failure)
    return outcomes


def _hush() -> None:
    """Keep Hydra's and its plugins' remarks off stderr: what went wrong is in the report."""
    for name in ("hydra", "hydra_plugins"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    for name in ("optuna.study", "optuna.storages"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Optuna 2, the one that Hydra's sweeper works with, is of the time of SQLAlchemy 1.
    warnings.filterwarnings("ignore", message="Deprecated API features detected")


def _with_hint(failure: BaseException) -> BaseException:
    """The failure, with how to get what is missing where it is one of Hydra's plugins."""
    message = user_message(failure)
    if message is None or not any(group in message for group in ("hydra/launcher", "hydra/sweeper")):
        return failure
    return UserError(f"{message} (launchers and sweepers are extras: pip install '.[slurm,tune]', for ray see README.md)")


def _quoted(text: str) -> str:
    """A value for Hydra's grammar, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _stamp(sweep: Path) -> str:
    """What tells a sweep from others; the same for all parts of a study."""
    name = next((part for part in reversed(sweep.parts) if part.startswith(_PREFIX)), sweep.name)
    return name.removeprefix(_PREFIX)


def _job(config: DictConfig) -> float | None:
    """One job; returns its objective to a search. Its failure is noted, not raised, so that the rest of the sweep still runs."""
    register_schema()
    settings = HydraConfig.get()
    sweep = Path(settings.sweep.dir)
    number = 0 if OmegaConf.is_missing(settings.job, "num") else int(settings.job.num)
    outcome = Outcome(number, settings.job.override_dirname)
    try:
        group = "" if settings.mode == RunMode.RUN else f"{config.name}-{_stamp(sweep)}"
        result = run(config, group=group)
        outcome.folder, outcome.reused = str(result.folder), result.reused
        if config.objective is not None:
            outcome.objective, outcome.value = config.objective, objective_value(config.objective, result.summary)
    except Exception as error:
        message = user_message(error)
        if message is None and os.environ.get("LAMBDASCALE_DEBUG"):
            raise
        outcome.error = message or f"internal error: {type(error).__name__}: {error}"
        outcome.status = 2 if message else 1
    note(sweep, outcome)
    if outcome.error and config.objective is not None:
        raise _SearchEnded(outcome.error)
    return outcome.value
