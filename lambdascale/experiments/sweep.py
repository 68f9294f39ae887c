"""The Hydra application behind scripts/run.py: single runs and sweeps under any launcher, one table and status at the end."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import uuid
import warnings
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lambdascale.cli.guard import user_message
from lambdascale.core import UserError
from lambdascale.experiments.compose import conf_dir
from lambdascale.experiments.outcomes import Outcome, note, read_outcomes, report
from lambdascale.experiments.runner import run
from lambdascale.experiments.schema import register_schema
from lambdascale.experiments.search import objective_value, report_search


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
    sweep = Path.cwd() / f".sweep-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    # argparse takes overrides in one piece only; -m may stand anywhere.
    flags = [argument for argument in argv if argument in ("-m", "--multirun")]
    overrides = [argument for argument in argv if argument not in flags]
    sys.argv = [sys.argv[0], *overrides, f"hydra.sweep.dir={_quoted(str(sweep))}", *flags]
    failure: BaseException | None = None
    try:
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(_job)()
        except (Exception, _SearchEnded) as error:
            failure = error
        outcomes = read_outcomes(sweep)
        report(outcomes)
        report_search(sweep, outcomes)
    finally:
        shutil.rmtree(sweep, ignore_errors=True)
    if failure is not None and not isinstance(failure, _SearchEnded):
        raise _with_hint(failure)
    return max((outcome.status for outcome in outcomes), default=0)


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


def _job(config: DictConfig) -> float | None:
    """One job; returns its objective to a search. Its failure is noted, not raised, so that the rest of the sweep still runs."""
    register_schema()
    settings = HydraConfig.get()
    sweep = Path(settings.sweep.dir)
    number = 0 if OmegaConf.is_missing(settings.job, "num") else int(settings.job.num)
    outcome = Outcome(number, settings.job.override_dirname)
    try:
        group = "" if settings.mode == RunMode.RUN else f"{config.name}-{sweep.name.removeprefix('.sweep-')}"
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
